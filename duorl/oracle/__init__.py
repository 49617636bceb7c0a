"""The oracle: it searches the best route of every token (Duo-LLM, arXiv 2410.10846, stage 2).

    table = exhaustive(model, tokens, context="reference", actions=("small", "big"))
    best = table.best(price=0.1)                     # (B, T), indices into table.routes
    table.loss(best).mean(), table.compute[best].mean()

`exhaustive` is exact. The `RouteTable` of one search has the best routes for all budgets. `beam`, `descent` and
`best_of_random` are for models with too many routes. `fixed_patterns` finds the best single route for all tokens.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
