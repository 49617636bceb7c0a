"""Scoped: a value for the code in a block, in its thread alone, that torch.compile can look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from threading import Lock
from typing import Generic, ParamSpec, TypeVar

import torch

Value = TypeVar("Value")
_Given = ParamSpec("_Given")


def uncompiled(function: Callable[_Given, Value]) -> Callable[_Given, Value]:
    """A function that torch.compile calls as it is.

    `torch.compiler.disable` does this too, but it imports the compiler, which takes a second, also where nobody
    compiles.
    """

    @wraps(function)
    def called(*args: _Given.args, **kwargs: _Given.kwargs) -> Value:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return called


class Scoped(Generic[Value]):
    """A value of type `Value` in a block, None elsewhere; each thread has its own.

    torch.compile cannot follow a context variable. But it watches `anywhere`: where no thread is in such a block, it
    compiles `get` as None, and where one comes into it later, it compiles again.

    Attributes:
        anywhere: whether a thread is in such a block.
    """

    def __init__(self, name: str):
        self.variable: ContextVar[Value | None] = ContextVar(name, default=None)
        self.anywhere = False
        self._blocks, self._lock = 0, Lock()

    def get(self) -> Value | None:
        """The value of the innermost block around; None without a block."""
        return self.variable.get() if self.anywhere else None

    @contextmanager
    def having(self, value: Value | None) -> Iterator[None]:
        """In this block, `get` returns `value`."""
        token = self.variable.set(value)
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)
            self.variable.reset(token)

    def _count(self, more: int) -> None:
        with self._lock:
            self._blocks += more
            self.anywhere = self._blocks > 0
