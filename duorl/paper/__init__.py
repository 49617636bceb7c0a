"""The study of Duo-LLM (arXiv 2410.10846), figure by figure, on any duo model.

`study` measures the numbers, `pictures` draws them, `claims` compares them with the claims of the paper.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
