"""Finds a user's own parts by import path: a reward, a router, a learner, a router input.

find("my_package.module.MyReward")
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any


def find(path: str) -> Any:
    """The object that an import path names; it may lie in the current folder.

    Raises:
        ValueError: there is no such module, it cannot be imported, or it has no such name; says which and why.
    """
    module_path, _, name = path.rpartition(".")
    if not all(part.isidentifier() for part in path.split(".")) or not module_path:
        raise ValueError(f"{path!r} is not an import path: write it as module.{name or 'Name'}")
    module = import_named(module_path)
    if not hasattr(module, name):
        raise ValueError(f"{module_path} has no {name}")
    return getattr(module, name)


def import_named(path: str) -> ModuleType:
    """The module that an import path names; it may lie in the current folder.

    Raises:
        ValueError: it cannot be imported, or lies in a folder of `not_from`; says why.
    """
    _refuse_barred(path)
    make_reachable(path)
    try:
        return importlib.import_module(path)
    except (Exception, SystemExit) as error:  # importing runs a user's code, which may raise anything
        raise ValueError(f"cannot import {path}: {type(error).__name__}: {error}") from error


_barred: ContextVar[tuple[Path, ...]] = ContextVar("barred", default=())


@contextmanager
def not_from(folder: Path) -> Iterator[None]:
    """In this block, nothing is imported from a folder: what others made may name code, and never brings it."""
    token = _barred.set((*_barred.get(), folder.resolve()))
    try:
        yield
    finally:
        _barred.reset(token)


def _refuse_barred(path: str) -> None:
    """Refuse a module that is not imported yet, wherever it would be found: `sys.path`, then the current folder."""
    top = path.partition(".")[0]
    if not _barred.get() or top in sys.modules:
        return
    spec = importlib.util.find_spec(top) or PathFinder.find_spec(top, [str(Path.cwd())])
    for place in (spec.origin, *(spec.submodule_search_locations or ())) if spec else ():
        if place is not None and (folder := _barred_around(Path(place).resolve())):
            raise ValueError(f"{path} lies in {folder}, beside what names it: code is imported from elsewhere alone")


def _barred_around(place: Path) -> Path | None:
    return next((folder for folder in _barred.get() if place.is_relative_to(folder)), None)


def make_reachable(path: str) -> None:
    """Put the current folder on `sys.path` where an import path leads into it and nowhere else.

    It goes last, so that a user's folder never stands in for an installed package of the same name.
    """
    here, top = Path.cwd(), path.partition(".")[0]
    if not top.isidentifier() or top in sys.modules or importlib.util.find_spec(top) is not None:
        return
    if (here / f"{top}.py").is_file() or (here / top).is_dir():
        sys.path.append(str(here))
        importlib.invalidate_caches()


def import_path(kind: type) -> str:
    """Where a class is found again: `module.Name`."""
    return f"{kind.__module__}.{kind.__qualname__}"
