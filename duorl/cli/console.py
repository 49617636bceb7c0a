"""What commands say: tables and bars, and the commands that repeat a run or go on with it."""

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

from duorl.runs.jobs import Job

console = Console()


def typed_command() -> str:
    """What repeats the run: what was typed, less the word to go on with it."""
    program = Path(sys.argv[0]).name
    typed = [word for word in sys.argv[1:] if word != "--resume"]
    return shlex.join([*(["python", program] if program.endswith(".py") else [program]), *typed])


def resume_command(folder: Path) -> str:
    """What goes on with the run in a folder."""
    words = [word for word in shlex.split(typed_command()) if word != "--overwrite"]
    if not any(word == "--out" or word.startswith("--out=") for word in words):
        words += ["--out", str(folder)]
    return shlex.join([*words, "--resume"])


def quieten() -> None:
    """Without transformers' own bars and warnings: what is wrong with the input is said in one line."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def say(line: str) -> None:
    """A line, as it is."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def say_logdir(folder: Path) -> None:
    """How TensorBoard is started here, whether or not the virtual environment is activated."""
    program = "tensorboard" if shutil.which("tensorboard") else str(Path(sys.executable).with_name("tensorboard"))
    say(f"{program} --logdir {folder / 'tensorboard'}")


class JobBars:
    """A bar for all jobs, and one for each that runs. Call it with what a job says: see `duorl.runs.jobs.run`."""

    def __init__(self, progress: Progress, total: int, done: int):
        self._progress = progress
        self._all = progress.add_task("jobs", total=total, completed=done, note="")
        self._running: dict[str, TaskID] = {}

    def __call__(self, job: Job, said: dict[str, Any]) -> None:
        """Show it."""
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


@contextmanager
def job_bars(total: int, done: int) -> Iterator[JobBars]:
    """Bars while jobs run; they are gone at the end."""
    columns = ("{task.description}", BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), "{task.fields[note]}")
    with Progress(*columns, console=console, transient=True) as progress:
        yield JobBars(progress, total, done)
