"""Reports: tables and pictures (`figures`), and the HTML page of a run (`page`)."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
