"""SIGINT and SIGTERM: a run saves what it has, then ends.

    with listening():                # from here both raise Interrupted, at once ...
        with deferred():             # ... but not here: they are noted,
            for step in training:
                ...
                check()              # and raised where all is saved

A second signal raises at once, wherever it comes.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """The process was told to end. Not an `Exception`: whoever catches those does not mean this.

    Args:
        signum: SIGINT or SIGTERM.
    """

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that ends by this signal: 130 or 143."""
        return 128 + self.signum


class _State:
    """Signals come to the process, so that what is known of them is the process's, too."""

    noted: int | None = None
    depth = 0


@contextmanager
def listening(*, ignore: int | None = None) -> Iterator[None]:
    """Both signals raise `Interrupted` inside. Outside of the main thread, which alone gets signals, nothing changes.

    Args:
        ignore: a signal to leave as it is.
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
    """A first signal is only noted inside; `check` raises it, or the end of the block."""
    _State.depth += 1
    try:
        yield
    finally:
        _State.depth -= 1
    if _State.depth == 0:
        check()


def pending() -> bool:
    """A signal has come: save, then `check`."""
    return _State.noted is not None


def check() -> None:
    """A safe point: raise the signal that has been noted.

    Raises:
        Interrupted: there is one.
    """
    if _State.noted is not None:
        raise Interrupted(_State.noted)


def _handle(signum: int, frame: FrameType | None) -> None:
    first = _State.noted is None
    _State.noted = signum
    if _State.depth == 0 or not first:
        raise Interrupted(signum)
