"""The study of Duo-LLM (arXiv 2410.10846), figure by figure, on any duo model.

`study` measures and leaves numbers, `pictures` draws them, `claims` sets them beside what the paper says.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
