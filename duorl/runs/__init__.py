"""Runs: a folder, a complete configuration and a list of jobs. Jobs run, stop and continue."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
