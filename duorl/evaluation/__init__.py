"""Evaluation: measuring routers, what they must beat, what stands above them, and the comparison of all.

measure | baseline (fixed patterns) | bound (searched routes)  ->  choice (what is searched)  ->  compare, budgets
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
