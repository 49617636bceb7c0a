from .approximate import Found, beam, best_of_random, descent, descent_flops
from .patterns import FixedPattern, fixed_patterns
from .search import SearchContext, all_routes, count_routes, exhaustive, tree_flops
from .table import RouteTable

__all__ = [
    "FixedPattern",
    "Found",
    "RouteTable",
    "SearchContext",
    "all_routes",
    "beam",
    "best_of_random",
    "count_routes",
    "descent",
    "descent_flops",
    "exhaustive",
    "fixed_patterns",
    "tree_flops",
]
