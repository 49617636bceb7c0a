"""Runs: a folder, a resolved configuration and a list of jobs. Where jobs run, how they stop, and how they go on."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
