"""Output on the terminal: tables, progress bars, and the commands that repeat or continue a run."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TimeElapsedColumn

from duorl.experiments.voice import Update, Voice
from duorl.runs.jobs import Job

console = Console()


def typed_command() -> str:
    """The command that repeats the run: the typed one without --resume."""
    program = Path(sys.argv[0]).name
    typed = [word for word in sys.argv[1:] if word != "--resume"]
    if program == "__main__.py":
        return shlex.join(["python", "-m", "duorl", *typed])
    return shlex.join([*(["python", program] if program.endswith(".py") else [program]), *typed])


def resume_command(folder: Path) -> str:
    """The command that continues the run in a folder."""
    words = [word for word in shlex.split(typed_command()) if word != "--overwrite"]
    if not any(word == "--out" or word.startswith("--out=") for word in words):
        words += ["--out", str(folder)]
    return shlex.join([*words, "--resume"])


def say(line: str) -> None:
    """Print a line without markup."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


class Terminal(Voice):
    """The voice of experiments on the terminal."""

    @property
    def command(self) -> str:  # type: ignore[override]
        """The typed command, without --resume."""
        return typed_command()

    def say(self, line: str) -> None:
        """Print a line."""
        say(line)

    def show(self, thing: Any) -> None:
        """Print a table or the like."""
        console.print(thing)

    @contextmanager
    def status(self, line: str) -> Iterator[Update]:
        """Show what is being done, until it is done."""
        with console.status(line) as shown:
            yield shown.update

    @contextmanager
    def job_bars(self, total: int, done: int) -> Iterator[JobBars]:
        """Show progress bars while jobs run; they disappear at the end."""
        columns = ("{task.description}", BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), "{task.fields[note]}")
        with Progress(*columns, console=console, transient=True) as progress:
            yield JobBars(progress, total, done)


def is_unicode() -> bool:
    """Whether the terminal has more than the characters of ASCII."""
    return console.encoding.lower().startswith("utf")


def say_logdir(folder: Path) -> None:
    """Print the command that starts TensorBoard; it also works if the virtual environment is not activated."""
    program = "tensorboard" if shutil.which("tensorboard") else str(Path(sys.executable).with_name("tensorboard"))
    say(f"{program} --logdir {folder / 'tensorboard'}")


class JobBars:
    """A progress bar for all jobs, and one per running job. It is called with the messages of `duorl.runs.jobs`."""

    def __init__(self, progress: Progress, total: int, done: int):
        self._progress = progress
        self._all = progress.add_task("jobs", total=total, completed=done, note="")
        self._running: dict[str, TaskID] = {}

    def __call__(self, job: Job, said: dict[str, Any]) -> None:
        """Show a message of a job."""
        if "line" in said:
            say(f"{job.name}: {said['line']}")
        elif "error" in said or "done" in said:
            if "error" in said:
                where = f" (traceback: {said['traceback']})" if said["traceback"] else ""
                say(f"{job.name} failed: {said['error']}{where}")
            if job.name in self._running:
                self._progress.remove_task(self._running.pop(job.name))
            self._progress.update(self._all, advance=1, note=f"{job.name}: {'failed' if 'error' in said else 'done'}")
        else:
            if job.name not in self._running:
                self._running[job.name] = self._progress.add_task(job.name, total=None, note="")
            self._progress.update(self._running[job.name], **said)
