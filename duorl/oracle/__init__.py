"""The oracle: search over a token's routes (Duo-LLM, arXiv 2410.10846, stage 2).

    table = exhaustive(model, tokens, context="reference", actions=("small", "big"))
    best = table.best(price=0.1)                     # (B, T), indices into table.routes
    table.loss(best).mean(), table.compute[best].mean()

`exhaustive` is exact; one search answers every budget (`RouteTable`). `beam`, `descent` and `best_of_random` are for
models whose routes cannot be enumerated, and `fixed_patterns` finds the best single route for all tokens.
"""

from duorl.oracle.approximate import Found, beam, best_of_random, descent
from duorl.oracle.patterns import FixedPattern, fixed_patterns
from duorl.oracle.search import SearchContext, all_routes, count_routes, exhaustive, tree_flops
from duorl.oracle.table import RouteTable

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
    "exhaustive",
    "fixed_patterns",
    "tree_flops",
]
