"""What a job says while it runs somewhere else: typed messages, and the two ends of their way.

    there:  answer(function, arguments, send, every)     # in a process, or in a task of a cluster
    here:   Channel.execute(function, arguments, tell)   # for every transport the same

A transport is a subclass of `Channel`. It brings messages in their order and adds `Files`, if the job works on another
disk, and `Lost`, if no more messages can come. What goes wrong here, as on a full disk, is no message: it ends the job
there, and is raised here.
"""

from __future__ import annotations

import signal
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duorl.runs import interrupts
from duorl.runs.jobs import Executor, Function, JobError, Tell, described
from duorl.runs.mirror import Change, apply


@dataclass(frozen=True)
class Said:
    """What the job told, see `duorl.runs.jobs.Tell`."""

    content: dict[str, Any]


@dataclass(frozen=True)
class Files:
    """What changed in the run's folder where the job runs; `folder` is the run's folder here."""

    changes: list[Change]
    folder: Path


@dataclass(frozen=True)
class Result:
    """The return value of the job's function; the last message."""

    value: dict[str, Any]


@dataclass(frozen=True)
class Failed:
    """An exception of the job: one line, and the traceback; the last message."""

    line: str
    details: str


@dataclass(frozen=True)
class Stopped:
    """The job got a signal and has saved its state; the last message."""

    signum: int


@dataclass(frozen=True)
class Lost:
    """The place where the job ran is gone; the last message."""

    line: str


Last = Result | Failed | Stopped | Lost
Message = Said | Files | Last


def answer(function: Function, arguments: dict[str, Any], send: Callable[[Message], None], every: float) -> Last:
    """Run a job's function where it runs.

    Args:
        function: the function.
        arguments: its arguments.
        send: called with what the job tells.
        every: seconds between two messages about its progress; lines are sent at once.

    Returns:
        The last message, to be sent by the caller.
    """
    told = 0.0

    def tell(**said: Any) -> None:
        nonlocal told
        if "line" in said or time.monotonic() - told >= every:
            told = time.monotonic()
            send(Said(said))

    try:
        return Result(function(**arguments, tell=tell))
    except interrupts.Interrupted as stop:
        return Stopped(stop.signum)
    except (Exception, SystemExit) as error:  # a job runs users' code, which may raise anything
        failed = described(error)
        return Failed(failed.line, failed.details)


class Channel(Executor):
    """Runs jobs somewhere else and hears what they say.

    Attributes:
        lives: number of places that a job may lose before it fails.
        stopping: whether the run ends.
    """

    lives: int = 1

    def __init__(self) -> None:
        self.stopping = False
        self.lock = threading.Lock()

    @abstractmethod
    def messages(self, function: Function, arguments: dict[str, Any]) -> Generator[Message, None, None]:
        """Start a job and bring its messages. If the generator is closed before the last one, the job ends at once."""

    def execute(self, function: Function, arguments: dict[str, Any], tell: Tell) -> dict[str, Any]:
        """Run a job somewhere else, again if that place is lost; see `Executor.execute`.

        Raises:
            OSError: what the job said cannot be shown.
        """
        for left in reversed(range(self.lives)):
            if self.stopping:
                raise interrupts.Interrupted(signal.SIGTERM)
            last = self._hear(function, arguments, tell)
            if isinstance(last, Result):
                return last.value
            if isinstance(last, Failed):
                raise JobError(last.line, last.details)
            if isinstance(last, Stopped):
                raise interrupts.Interrupted(last.signum)
            if self.stopping:
                raise interrupts.Interrupted(signal.SIGTERM)
            if not left:
                raise JobError(last.line if self.lives == 1 else f"{last.line}, {self.lives} times")
            tell(line=f"{last.line}: its job goes on from the last checkpoint")
        raise AssertionError("unreachable")

    def _hear(self, function: Function, arguments: dict[str, Any], tell: Tell) -> Last:
        """Handle a job's messages up to the last one, which is returned."""
        messages = self.messages(function, arguments)
        try:
            for message in messages:
                if isinstance(message, Said):
                    tell(**message.content)
                elif isinstance(message, Files):
                    _written(message)
                else:
                    return message
        finally:
            messages.close()
        return Lost("it ended without a result")


def _written(files: Files) -> None:
    """Write what changed elsewhere.

    Raises:
        JobError: the disk here is full.
    """
    try:
        apply(files.changes, files.folder)
    except OSError as error:
        raise described(error) from error
