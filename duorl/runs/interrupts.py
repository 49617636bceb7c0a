"""SIGINT and SIGTERM: a run saves its state, then ends.

    with listening():                # in this block, both signals raise Interrupted immediately ...
        with deferred():             # ... but in this block they are only stored,
            for step in training:
                ...
                check()              # and raised here, after saving

A second signal always raises immediately.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from duorl import ranks

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """The process got a signal to end. It is not an `Exception`, so `except Exception` does not catch it.

    Args:
        signum: SIGINT or SIGTERM.
    """

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """The usual exit code after this signal: 130 or 143."""
        return 128 + self.signum


class _State:
    """The state of signal handling; it belongs to the process, because signals do."""

    noted: int | None = None
    depth = 0


@contextmanager
def listening(*, ignore: int | None = None) -> Iterator[None]:
    """In this block, both signals raise `Interrupted`. It has an effect in the main thread only.

    Args:
        ignore: a signal that is not handled here.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _handle) for number in SIGNALS if number != ignore}
    _State.noted = None
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _State.noted = None


@contextmanager
def deferred() -> Iterator[None]:
    """In this block, a first signal is only stored; `check` or the end of the block raises it."""
    _State.depth += 1
    try:
        yield
    finally:
        _State.depth -= 1
    if _State.depth == 0:
        check()


@contextmanager
def immediate() -> Iterator[None]:
    """In this block, also within `deferred`, a signal is raised immediately: what runs in it has nothing to save."""
    check()
    before, _State.depth = _State.depth, 0
    try:
        yield
    finally:
        _State.depth = before


def pending() -> bool:
    """Whether a signal is stored; then save and call `check`."""
    return _State.noted is not None


def asked() -> bool:
    """Whether a signal is stored on some rank; all ranks then stop at the same update."""
    if ranks.any_of(pending()) and not pending():
        ask(signal.SIGTERM)
    return pending()


def ask(signum: int) -> None:
    """Store a signal that came in another way, for example over the network."""
    _State.noted = signum


def forget() -> None:
    """Forget a stored signal: what it was for has ended."""
    _State.noted = None


def check() -> None:
    """Raise the stored signal, if there is one; call this at a safe point.

    Raises:
        Interrupted: a signal is stored.
    """
    if _State.noted is not None:
        raise Interrupted(_State.noted)


def _handle(signum: int, frame: FrameType | None) -> None:
    first = _State.noted is None
    _State.noted = signum
    if _State.depth == 0 or not first:
        raise Interrupted(signum)
