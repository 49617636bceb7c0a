"""Making small networks for a model whose own networks are the big ones: choose, regress, distil."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
