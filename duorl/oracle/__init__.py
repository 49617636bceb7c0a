"""The oracle: search over a token's routes (Duo-LLM, arXiv 2410.10846, stage 2).

    table = exhaustive(model, tokens, context="reference", actions=("small", "big"))
    best = table.best(price=0.1)                     # (B, T), indices into table.routes
    table.loss(best).mean(), table.compute[best].mean()

`exhaustive` is exact; one search answers every budget (`RouteTable`). `beam`, `descent` and `best_of_random` are for
models whose routes cannot be enumerated, and `fixed_patterns` finds the best single route for all tokens.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
