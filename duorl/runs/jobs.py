"""Jobs: the parts of a run. Each job has a folder for its results. An executor runs them.

    jobs = [Job("PPO", folder / "routers/PPO", train, {"name": "PPO"}), ...]
    run(jobs, InProcess(), folder, tell=print)

A job is finished if its folder has `result.json`, which is written last. A finished job does not run again. An executor
is a class with one method, `execute`, and a line in `executor`. Jobs run in this process or in other processes.
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

from duorl import ranks
from duorl.checks import BadInput
from duorl.devices import threads_for
from duorl.files import is_no_room, write_json, write_text
from duorl.runs import interrupts

RESULT, CHECKPOINT = "result.json", "checkpoint.safetensors"
_LOOK = 0.2  # seconds between two checks for signals

Tell = Callable[..., None]
"""Called with messages of a running job, JSON values: completed=, total=, note=, line=."""

Function = Callable[..., dict[str, Any]]
"""The function of a job. It takes its arguments by name, and a `Tell` as `tell`. To run in another process, it must be
on the top level of a module. While it runs, signals are deferred: it calls `interrupts.check()` where it can stop.
"""


@dataclass(frozen=True)
class Job:
    """One part of a run.

    Args:
        name: unique in its run.
        place: the folder of its results.
        function: does the work; its return value is kept as the job's result.
        arguments: arguments of the function: JSON values, and paths as `Path`, which alone are taken for paths.
        after: names of jobs that must be finished first.
    """

    name: str
    place: Path
    function: Function
    arguments: dict[str, Any] = field(default_factory=dict)
    after: tuple[str, ...] = ()

    @property
    def finished(self) -> bool:
        """Whether the job is finished."""
        return (self.place / RESULT).is_file()

    @property
    def result(self) -> dict[str, Any]:
        """The return value of a finished job's function."""
        return json.loads((self.place / RESULT).read_text())


class JobError(Exception):
    """A job failed.

    Args:
        line: the error in one line.
        details: the traceback, if there is one.
    """

    def __init__(self, line: str, details: str = ""):
        super().__init__(line)
        self.line, self.details = line, details or line


class Executor(ABC):
    """Runs jobs.

    Attributes:
        slots: number of jobs at the same time. With 1, jobs run in the calling thread and get signals themselves.
    """

    slots: int = 1

    @abstractmethod
    def execute(self, function: Function, arguments: dict[str, Any], tell: Tell) -> dict[str, Any]:
        """Run a function to its end and return what it returns. Called from several threads at once.

        Raises:
            JobError: the function raised an exception, or its process died.
            Interrupted: it was stopped.
        OSError: the messages cannot be shown, which ends the run.
        """

    def close(self) -> None:  # noqa: B027
        """Release resources: there are no more jobs."""

    @abstractmethod
    def stop(self, *, at_once: bool = False) -> None:
        """Make running jobs save and end, or end immediately."""


class InProcess(Executor):
    """Runs one job after the other in this process."""

    def execute(self, function: Function, arguments: dict[str, Any], tell: Tell) -> dict[str, Any]:
        """Call the function; `BadInput` ends the run, because no job can use the input."""
        try:
            return function(**arguments, tell=tell)
        except BadInput:
            raise
        except Exception as error:  # a job runs users' code, which may raise anything
            raise described(error) from error

    def stop(self, *, at_once: bool = False) -> None:
        """Do nothing: a job in this process gets the signals itself."""


def described(error: BaseException) -> JobError:
    """The error of a job from an exception: class and message in one line, and the traceback."""
    line = " ".join(f"{type(error).__name__}: {error}".split())
    if is_no_room(error):
        line = f"the disk is full ({line}): make room, then continue with --resume"
    return JobError(line, "".join(traceback.format_exception(error)))


def executor(processes: int, threads: int | None = None) -> Executor:
    """An executor for this number of jobs at the same time, each with a number of threads; by default they share."""
    from duorl.runs.processes import SideBySide

    return InProcess() if processes == 1 else SideBySide(processes, threads_for(processes, threads))


def run(jobs: Sequence[Job], place: Executor, folder: Path, tell: Callable[[Job, dict[str, Any]], None]) -> list[Job]:
    """Run the jobs that are not finished, each after the jobs that it needs.

    The traceback of a failed job goes to `errors/NAME.txt`. Jobs that need it do not run; all others do.

    Args:
        jobs: jobs of the run; a job comes after those that it needs.
        place: the executor.
        folder: folder of the run.
        tell: called with the messages of a job, with `error=` if it fails, and with `done=True` if it is finished.

    Returns:
        The jobs that are not finished: those that failed, and those that need them.

    Raises:
        Interrupted: the process got a signal to end; running jobs have saved their state.
        BadInput: a job in this process cannot use the input of the run.
        OSError: messages cannot be shown, for example on a full disk; running jobs are ended.
    """
    if place.slots == 1:
        for job in jobs:
            if not job.finished and _ready(job, jobs):
                with interrupts.deferred():  # the job itself decides where it stops
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
        _finish(job, place.execute(job.function, job.arguments, lambda **said: tell(job, said)))
    except interrupts.Interrupted:
        if place.slots == 1:
            raise
        return  # the main thread handles it
    except JobError as error:
        _keep(errors, error.details)
        tell(job, {"error": error.line, "traceback": str(errors)})
        return
    tell(job, {"done": True})


def _finish(job: Job, result: dict[str, Any]) -> None:
    """Keep the result of a job; with it, the job is finished.

    Raises:
        JobError: the disk is full.
    """
    try:
        if ranks.first():
            write_json(job.place / RESULT, result)
            (job.place / CHECKPOINT).unlink(missing_ok=True)  # the result is complete
    except OSError as error:
        raise described(error) from error
    ranks.wait()


def _keep(path: Path, text: str) -> None:
    try:
        write_text(path, text)
    except OSError:  # the disk is full: the message is printed already; continue with the other jobs
        return
