"""What a task of a cluster does, on the machine where it runs."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from duorl.runs import interrupts
from duorl.runs.jobs import Function, described
from duorl.runs.mirror import Mirror, scatter
from duorl.runs.processes import prepare

RUN = "duorl-run"
"""The run's folder, where a task works; a name that nobody else gives, because messages are searched for it."""
_EVERY = 1.0  # seconds between two looks at the files and at the switch

Message = tuple[str, Any]


def work(
    function: Function,
    arguments: dict[str, Any],
    files: Mapping[str, bytes],
    inputs: Mapping[str, Any],
    switch: Any,
    threads: int,
) -> Iterator[Message]:
    """Run a job's function in a temporary folder.

    Args:
        function: see `duorl.runs.jobs.Function`.
        arguments: its arguments, with paths in `RUN`.
        files: content of the run's folder, as far as the job needs it.
        inputs: references to the content of other files, by their paths in the current folder.
        switch: an actor; `is_on` says whether to stop.
        threads: threads of torch.

    Yields:
        `begun`, then `said` with the job's messages, `files` with changes, and last `result`, `error` or `interrupted`.
    """
    import ray

    yield "begun", None
    with _elsewhere():
        scatter({path: ray.get(content) for path, content in inputs.items()}, Path())
        scatter(files, Path(RUN))
        mirror, said = Mirror(Path(RUN)), queue.SimpleQueue[Message]()
        thread = threading.Thread(target=_run, args=(function, arguments, threads, said), daemon=True)
        thread.start()
        last, looked = None, 0.0
        while last is None:
            if time.monotonic() - looked >= _EVERY:
                looked = time.monotonic()
                if ray.get(switch.is_on.remote()):
                    interrupts.ask(signal.SIGTERM)
                if changes := mirror.changes():
                    yield "files", changes
            with contextlib.suppress(queue.Empty):
                message = said.get(timeout=_EVERY / 4)
                if message[0] == "said":
                    yield message
                else:
                    last = message
        thread.join()
        interrupts.forget()
        yield "files", mirror.changes()
        yield last


def _run(function: Function, arguments: dict[str, Any], threads: int, said: queue.SimpleQueue[Message]) -> None:
    prepare(threads)  # in this thread, whose number it is
    told = 0.0

    def tell(**what: Any) -> None:
        nonlocal told
        if "line" in what or time.monotonic() - told >= _EVERY:
            told = time.monotonic()
            said.put(("said", what))

    try:
        said.put(("result", function(**arguments, tell=tell)))
    except interrupts.Interrupted as stop:
        said.put(("interrupted", stop.signum))
    except Exception as error:  # a job runs users' code, which may raise anything
        found = described(error)
        said.put(("error", (found.line, found.details)))
    except BaseException as error:  # SystemExit would end this thread without a word
        said.put(("error", (f"{type(error).__name__}: {error}", "")))


@contextlib.contextmanager
def _elsewhere() -> Iterator[None]:
    """In this block, the current folder is a temporary one, and modules are found in it."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="duorl-") as place:
        os.chdir(place)
        sys.path.insert(0, place)
        try:
            yield
        finally:
            sys.path.remove(place)
            os.chdir(before)
