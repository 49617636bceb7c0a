"""Evaluation: measure routers and compare them with fixed patterns (baseline) and with the best routes (bound).

measure -> frontier (what mixing reaches) | baseline (fixed patterns) | bound (searched routes)
-> choice (what is searched) -> compare, budgets
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
