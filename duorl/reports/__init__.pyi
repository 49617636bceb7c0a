from . import figures, page

__all__ = ["figures", "page"]
