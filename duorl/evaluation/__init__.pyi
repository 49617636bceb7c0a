from .baseline import Baseline
from .bound import Bound, find_bound
from .budgets import budget_rows, summaries
from .choice import Choice, check_searches, choose, flops_per_second
from .compare import Comparer, Comparison
from .flat import flatten
from .frontier import Frontier, Ladder
from .measure import Measurement, evaluate, measure
from .options import EvaluationOptions
from .route_search import (
    RouteSearch,
    RouteSearchOptions,
    RouteSearchPlan,
    choose_starts,
    plan_route_search,
    search_windows,
    summarize,
)
from .transfer import learned_on, transfer_rows

__all__ = [
    "Baseline",
    "Bound",
    "Choice",
    "Comparer",
    "Comparison",
    "EvaluationOptions",
    "Frontier",
    "Ladder",
    "Measurement",
    "RouteSearch",
    "RouteSearchOptions",
    "RouteSearchPlan",
    "budget_rows",
    "check_searches",
    "choose",
    "choose_starts",
    "evaluate",
    "find_bound",
    "flatten",
    "flops_per_second",
    "learned_on",
    "measure",
    "plan_route_search",
    "search_windows",
    "summaries",
    "summarize",
    "transfer_rows",
]
