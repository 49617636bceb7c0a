"""Jobs: the pieces of a run, each with a place for what it leaves, and where they are executed.

    jobs = [Job("PPO", folder / "routers/PPO", train, {"name": "PPO"}), ...]
    run(jobs, InProcess(), folder, tell=print)

A finished job is one whose place holds `result.json`, which is written last; it is not run again. A place where jobs
run is a class with one method, `execute`, and a line in `executor`: here, in this process or in processes beside it.
"""

from __future__ import annotations

import json
import threading
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from duorl.files import is_no_room, write_json, write_text
from duorl.runs import interrupts

RESULT, CHECKPOINT = "result.json", "checkpoint.safetensors"
_LOOK = 0.2  # seconds between two looks at signals

Tell = Callable[..., None]
"""Called with what there is to say of a running job, JSON values: completed=, total=, note=, line=."""

Function = Callable[..., dict[str, Any]]
"""Takes its arguments by name and a `Tell` as `tell`; on the top level of a module, where it is to run elsewhere.

Signals are deferred while it runs: it calls `interrupts.check()` where it is safe to stop.
"""


@dataclass(frozen=True)
class Job:
    """One piece of a run.

    Args:
        name: unique in its run.
        place: the folder of what it leaves.
        function: does it; what it returns is kept as the job's result.
        arguments: of the function, JSON values.
        after: names of jobs that must be finished first.
    """

    name: str
    place: Path
    function: Function
    arguments: dict[str, Any] = field(default_factory=dict)
    after: tuple[str, ...] = ()

    @property
    def finished(self) -> bool:
        """It need not run again."""
        return (self.place / RESULT).is_file()

    @property
    def result(self) -> dict[str, Any]:
        """What a finished job's function returned."""
        return json.loads((self.place / RESULT).read_text())


class JobError(Exception):
    """A job went wrong.

    Args:
        line: the error in one line.
        details: the traceback, where there is one.
    """

    def __init__(self, line: str, details: str = ""):
        super().__init__(line)
        self.line, self.details = line, details or line


class Executor(ABC):
    """Where jobs are executed.

    Attributes:
        slots: how many at a time; 1: in the calling thread, and signals reach the job itself.
    """

    slots: int = 1

    @abstractmethod
    def execute(self, function: Function, arguments: dict[str, Any], tell: Tell) -> dict[str, Any]:
        """Run a function to its end and return what it returns. Called from several threads at once.

        Raises:
            JobError: the function raised an exception, or what it ran in has died.
            Interrupted: it was stopped.
        """

    def close(self) -> None:  # noqa: B027
        """No more jobs will come."""

    @abstractmethod
    def stop(self, *, at_once: bool = False) -> None:
        """Have what runs save and end; or end at once."""


class InProcess(Executor):
    """One job after the other, here."""

    def execute(self, function: Function, arguments: dict[str, Any], tell: Tell) -> dict[str, Any]:
        """Call the function."""
        try:
            return function(**arguments, tell=tell)
        except Exception as error:  # a job runs users' code, which may raise anything
            raise described(error) from error

    def stop(self, *, at_once: bool = False) -> None:
        """Nothing: a job in this process hears the signals itself."""


def described(error: Exception) -> JobError:
    """An exception as a job's error: its class and words in one line, and its traceback."""
    line = " ".join(f"{type(error).__name__}: {error}".split())
    if is_no_room(error):
        line = f"the disk is full ({line}): go on with --resume once there is room"
    return JobError(line, "".join(traceback.format_exception(error)))


def executor(processes: int, threads: int) -> Executor:
    """One for so many jobs at a time, among which the threads are divided."""
    from duorl.runs.processes import SideBySide

    return InProcess() if processes == 1 else SideBySide(processes, max(1, threads // processes))


def run(jobs: Sequence[Job], place: Executor, folder: Path, tell: Callable[[Job, dict[str, Any]], None]) -> list[Job]:
    """Run the jobs that are not finished, each after those it needs.

    A failed job leaves its traceback in `errors/NAME.txt`; those that need it are left out, all others run.

    Args:
        jobs: the run's; a job comes behind those it needs.
        place: where they are executed.
        folder: the run's.
        tell: told of a job what it says of itself, `error=` when it fails, `done=True` when it is finished.

    Returns:
        The jobs that are still not finished: those that failed, and those that need them.

    Raises:
        Interrupted: the process was told to end; what ran has saved its state.
    """
    if place.slots == 1:
        for job in jobs:
            if not job.finished and _ready(job, jobs):
                _one(job, place, folder, tell)
        return [job for job in jobs if not job.finished]
    try:
        with interrupts.deferred():
            _run_side_by_side(jobs, place, folder, tell)
    except interrupts.Interrupted:
        place.stop(at_once=True)
        raise
    finally:
        place.close()
    return [job for job in jobs if not job.finished]


def _run_side_by_side(
    jobs: Sequence[Job], place: Executor, folder: Path, tell: Callable[[Job, dict[str, Any]], None]
) -> None:
    waiting = [job for job in jobs if not job.finished]
    running: set[Future] = set()
    lock = threading.Lock()

    def tell_one(job: Job, said: dict[str, Any]) -> None:
        with lock:
            tell(job, said)

    with ThreadPoolExecutor(place.slots) as threads:
        try:
            while running or any(_ready(job, jobs) for job in waiting):
                for job in [job for job in waiting if _ready(job, jobs)][: place.slots - len(running)]:
                    waiting.remove(job)
                    running.add(threads.submit(_one, job, place, folder, tell_one))
                done, running = wait(running, _LOOK, FIRST_COMPLETED)
                for future in done:
                    future.result()
                if interrupts.pending():
                    waiting = []
                    place.stop()
        except BaseException:
            place.stop(at_once=True)
            raise


def _ready(job: Job, jobs: Sequence[Job]) -> bool:
    return all(other.finished for other in jobs if other.name in job.after)


def _one(job: Job, place: Executor, folder: Path, tell: Callable[[Job, dict[str, Any]], None]) -> None:
    errors = folder / "errors" / f"{job.name.replace('/', '_')}.txt"
    errors.unlink(missing_ok=True)
    try:
        with interrupts.deferred():  # a job says itself where it is safe to stop; side by side this changes nothing
            result = place.execute(job.function, job.arguments, lambda **said: tell(job, said))
            write_json(job.place / RESULT, result)
            (job.place / CHECKPOINT).unlink(missing_ok=True)  # what it was for is whole
    except interrupts.Interrupted:
        if place.slots == 1:
            raise
        return  # the run's own thread knows of it
    except JobError as error:
        _keep(errors, error.details)
        tell(job, {"error": error.line, "traceback": str(errors)})
        return
    except OSError as error:
        tell(job, {"error": described(error).line, "traceback": ""})
        return
    tell(job, {"done": True})


def _keep(path: Path, text: str) -> None:
    try:
        write_text(path, text)
    except OSError:  # the disk is full: the line has been said, and the other jobs matter more
        return
