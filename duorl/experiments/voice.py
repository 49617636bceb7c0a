"""What an experiment says while it runs, to whoever started it. The command line writes it on the terminal.

    with speaking(Terminal()):
        experiment(folder)

Without such a block, an experiment is silent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from duorl.runs.jobs import Job

Update = Callable[[str], None]
Heard = Callable[[Job, dict[str, Any]], None]


class Voice:
    """A silent voice, and the base class of others.

    Attributes:
        command: what repeats the experiment; it stands in results.
    """

    command: str = ""

    def say(self, line: str) -> None:
        """Say a line, which has no markup."""

    def show(self, thing: Any) -> None:
        """Show what rich can show: a table, Markdown, a text with markup."""

    @contextmanager
    def status(self, line: str) -> Iterator[Update]:
        """In this block, a line says what is being done; it can be changed."""
        yield lambda line: None

    @contextmanager
    def job_bars(self, total: int, done: int) -> Iterator[Heard]:
        """In this block, jobs run; what they say comes here."""
        yield lambda job, said: None


_voice: ContextVar[Voice] = ContextVar("voice", default=Voice())  # noqa: B039, it has no state


@contextmanager
def speaking(voice: Voice) -> Iterator[None]:
    """In this block, experiments of this thread speak with a voice."""
    token = _voice.set(voice)
    try:
        yield
    finally:
        _voice.reset(token)


def command() -> str:
    """The command that repeats the experiment."""
    return _voice.get().command


def say(line: str) -> None:
    """Say a line, see `Voice.say`."""
    _voice.get().say(line)


def show(thing: Any) -> None:
    """Show a table or the like, see `Voice.show`."""
    _voice.get().show(thing)


def status(line: str) -> AbstractContextManager[Update]:
    """Say what is being done, see `Voice.status`."""
    return _voice.get().status(line)


def job_bars(total: int, done: int) -> AbstractContextManager[Heard]:
    """Show how jobs run, see `Voice.job_bars`."""
    return _voice.get().job_bars(total, done)


def say_written(folder: Path, *parts: str) -> None:
    """Say where the results of a run are: those of its parts that are there."""
    say(f"wrote {folder}/: {', '.join(part for part in parts if (folder / part).exists())}")
