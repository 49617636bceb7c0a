"""What a task of a cluster does, on the machine where it runs."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from duorl.files import temporary_folder
from duorl.runs import interrupts
from duorl.runs.channel import Files, Message, Said, answer
from duorl.runs.jobs import Function
from duorl.runs.mirror import Mirror, scatter
from duorl.runs.processes import prepare

RUN = "duorl-run"
"""The run's folder, where a task works; a name that nobody else gives, because messages are searched for it."""
_EVERY = 1.0  # seconds between two looks at the files and at the switch


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
        First that nothing has changed in the run's folder: the job has a machine. Then what it says and changes.
    """
    import ray

    yield Files([], Path(RUN))
    with _elsewhere():
        scatter({path: ray.get(content) for path, content in inputs.items()}, Path())
        scatter(files, Path(RUN))
        mirror, said = Mirror(Path(RUN)), queue.SimpleQueue[Message]()

        def run() -> None:
            prepare(threads)  # in this thread, whose number it is
            said.put(answer(function, arguments, said.put, _EVERY))

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        last, looked = None, 0.0
        while last is None:
            if time.monotonic() - looked >= _EVERY:
                looked = time.monotonic()
                if ray.get(switch.is_on.remote()):
                    interrupts.ask(signal.SIGTERM)
                if changes := mirror.changes():
                    yield Files(changes, Path(RUN))
            with contextlib.suppress(queue.Empty):
                message = said.get(timeout=_EVERY / 4)
                if isinstance(message, Said):
                    yield message
                else:
                    last = message
        thread.join()
        interrupts.forget()
        yield Files(mirror.changes(), Path(RUN))
        yield last


@contextlib.contextmanager
def _elsewhere() -> Iterator[None]:
    """In this block, the current folder is a temporary one, and modules are found in it."""
    before = Path.cwd()
    with temporary_folder() as place:
        os.chdir(place)
        sys.path.insert(0, str(place))
        try:
            yield
        finally:
            sys.path.remove(str(place))
            os.chdir(before)
