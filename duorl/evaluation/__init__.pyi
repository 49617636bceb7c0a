from .baseline import Baseline
from .bound import Bound, find_bound
from .budgets import Ladder, budget_rows, summaries
from .choice import Choice, check_searches, choose, flops_per_second, training_flops
from .compare import Comparer, Comparison
from .flat import flatten
from .measure import Measurement, evaluate, measure
from .options import EvaluationOptions
from .route_search import RouteSearch, RouteSearchOptions, RouteSearchPlan, plan_route_search, search_routes
from .transfer import learned_on, transfer_rows

__all__ = [
    "Baseline",
    "Bound",
    "Choice",
    "Comparer",
    "Comparison",
    "EvaluationOptions",
    "Ladder",
    "Measurement",
    "RouteSearch",
    "RouteSearchOptions",
    "RouteSearchPlan",
    "budget_rows",
    "check_searches",
    "choose",
    "evaluate",
    "find_bound",
    "flatten",
    "flops_per_second",
    "learned_on",
    "measure",
    "plan_route_search",
    "search_routes",
    "summaries",
    "training_flops",
    "transfer_rows",
]
