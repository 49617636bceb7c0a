"""Runs jobs as tasks of a Ray cluster, whose machines share no files with this one. It needs the extra `ray`.

A task gets the files of its job as bytes: the run's configuration, the job's folders with the last checkpoint, the
user's own modules, and what the options name to read by a relative path. It works in a temporary folder and sends back
what changes there, about every second. So curves and checkpoints stand where the run stands. If a machine is lost, its
jobs go on elsewhere from the last checkpoint that arrived.

A cluster is trusted ground: Ray sends pickled objects between its machines. None of them is written to disk here.
"""

from __future__ import annotations

import logging
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from duorl.files import PART, temporary_folder
from duorl.runs import interrupts
from duorl.runs.channel import Channel, Failed, Files, Lost, Message, Said
from duorl.runs.folders import CONFIG
from duorl.runs.jobs import Function
from duorl.runs.mirror import gathered
from duorl.runs.remote import RUN, work

_PATIENCE = 10  # seconds


@dataclass(frozen=True)
class Needs:
    """What each job needs of a machine.

    Args:
        cores: number of cores, and of torch's threads.
        gpus: number of GPUs.
        memory: bytes.
    """

    cores: int = 1
    gpus: int = 0
    memory: int = 0

    @property
    def named(self) -> dict[str, float]:
        """The needs by Ray's names."""
        return {name: float(n) for name, n in (("CPU", self.cores), ("GPU", self.gpus), ("memory", self.memory)) if n}


def connect(address: str, needs: Needs) -> Any:
    """Connect this process to a cluster, and send it DuoRL's own code.

    Args:
        address: `auto` for the cluster of this machine, or `HOST:PORT`.
        needs: what each job will need.

    Returns:
        The module `ray`.

    Raises:
        ValueError: the extra is missing, there is no cluster, or no machine of it has what a job needs.
    """
    if find_spec("ray") is None:
        raise ValueError('a cluster needs Ray: pip install "ray>=2.40"')
    import ray

    _require_answer(address)
    with temporary_folder() as place:
        code, handlers = _package(place), {number: signal.getsignal(number) for number in interrupts.SIGNALS}
        try:
            ray.init(address=address, runtime_env={"py_modules": [str(code)]}, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as problem:
            raise _no_answer(address) from problem
        finally:
            _restore(handlers)
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(all(machine.get(name, 0) >= n for name, n in needs.named.items()) for machine in machines):
        ray.shutdown()
        asked = ", ".join(f"{name} {n:g}" for name, n in needs.named.items())
        raise ValueError(f"a job asks for {asked}, and no machine of the cluster has that: lower --threads")
    return ray


def _restore(handlers: Mapping[signal.Signals, Any]) -> None:
    """Set handlers of signals again: Ray has replaced them, and a run could not save before it ends."""
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _require_answer(address: str) -> None:
    """Look whether somebody answers: Ray itself waits for minutes."""
    host, colon, port = address.rpartition(":")
    if address == "auto":
        return
    if not (colon and port.isdecimal()):
        raise ValueError(f"cluster must be auto or HOST:PORT, not {address!r}")
    try:
        socket.create_connection((host, int(port)), timeout=_PATIENCE).close()
    except (OSError, OverflowError) as problem:
        raise _no_answer(address) from problem


def _no_answer(address: str) -> ValueError:
    fix = "start one with `ray start --head`, or give the HOST:PORT of its head"
    return ValueError(f"no Ray cluster answers at {address}: {fix}")


def _package(place: Path) -> Path:
    """A copy of the package as it is installed: `duorl/agents` and `duorl/envs` may stand elsewhere in its sources."""
    for name in ("duorl", "duorl.agents", "duorl.envs"):
        spec = find_spec(name)
        assert spec is not None and spec.submodule_search_locations is not None
        ignored = shutil.ignore_patterns("__pycache__")
        there = place.joinpath(*name.split("."))
        shutil.copytree(next(iter(spec.submodule_search_locations)), there, ignore=ignored, dirs_exist_ok=True)
    return place / "duorl"


class OnCluster(Channel):
    """Runs jobs as tasks of a cluster, again if their machine is lost.

    Args:
        ray: of `connect`.
        folder: folder of the run; the jobs' arguments may name paths in it.
        needs: what each job needs.
        slots: number of jobs that are handed to the cluster at the same time.
        inputs: files and folders in the current folder that jobs read; they are sent along, and so are the modules
            there that are imported.
    """

    lives = 5

    def __init__(self, ray: Any, folder: Path, needs: Needs, slots: int, inputs: Sequence[Path]):
        super().__init__()
        self.ray, self.folder, self.needs, self.slots = ray, folder, needs, max(2, slots)
        self._switch = ray.remote(num_cpus=0)(_Switch).options(scheduling_strategy=_here(ray)).remote()
        here = Path.cwd()
        sent = gathered(here, [*(here / path for path in inputs), *_own_modules(here)])
        self._inputs = {path: ray.put(content) for path, content in sent.items()}
        self._running: set[Any] = set()
        self._waiting: set[Any] = set()  # those that have no machine yet

    def messages(self, function: Function, arguments: dict[str, Any]) -> Generator[Message, None, None]:
        """Run a job as a task; see `Channel.messages`."""
        messages = self._started(function, arguments)
        ended = False
        try:
            for reference in messages:
                message = self.ray.get(reference)
                ended = not isinstance(message, Said | Files)
                with self.lock:
                    self._waiting.discard(messages)  # it has a machine
                yield self._as_here(message)
            ended = True
        except self.ray.exceptions.RayTaskError as error:  # not the job's own error, which comes as a message
            ended = True
            yield Failed(" ".join(str(error.cause).split()), str(error))
        except self.ray.exceptions.RayError as error:
            ended = True
            yield Lost(f"a machine was lost ({type(error).__name__})")
        finally:
            with self.lock:
                self._running.discard(messages)
                self._waiting.discard(messages)
            if not ended:
                self.ray.cancel(messages, force=True)

    def stop(self, *, at_once: bool = False) -> None:
        """Ask the tasks to save and end, or end them; those that have not begun end without beginning."""
        with self.lock:
            first, self.stopping = not self.stopping, True
            for task in self._running if at_once else self._waiting if first else ():
                self.ray.cancel(task, force=True)
            if first and not at_once:
                self._switch.flip.remote()

    def close(self) -> None:
        """Leave the cluster."""
        self.ray.shutdown()

    def _started(self, function: Function, arguments: dict[str, Any]) -> Iterator[Any]:
        """Hand a job to the cluster; its messages come as references."""
        needed = self.needs
        options = {"num_cpus": needed.cores, "num_gpus": needed.gpus, "memory": needed.memory or None}
        task = self.ray.remote(max_retries=0, num_returns="streaming", **options)(work)
        files, there = gathered(self.folder, self._parts(arguments)), self._there(arguments)
        with self.lock:
            if self.stopping:
                raise interrupts.Interrupted(signal.SIGTERM)
            messages = task.remote(function, there, files, self._inputs, self._switch, needed.cores)
            self._running.add(messages)
            self._waiting.add(messages)
        return messages

    def _as_here(self, message: Message) -> Message:
        """A message with the run's folder as it is called here."""
        if isinstance(message, Files):
            return replace(message, folder=self.folder)
        if isinstance(message, Failed):
            here = [text.replace(f"{RUN}/", f"{self.folder}/") for text in (message.line, message.details)]
            return Failed(*here)
        return message

    def _parts(self, arguments: Mapping[str, Any]) -> list[Path]:
        """What a job reads of the run's folder: its configuration, and the folders that its arguments name."""
        inside = (path for path in _paths(arguments) if path.is_relative_to(self.folder) and path != self.folder)
        return [self.folder / CONFIG, *(path for path in inside if path.exists())]

    def _there(self, value: Any) -> Any:
        """An argument with the paths that it has where the job runs."""
        if isinstance(value, Mapping):
            return {name: self._there(inner) for name, inner in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(map(self._there, value))
        if isinstance(value, Path) and value.is_relative_to(self.folder):
            return Path(RUN) / value.relative_to(self.folder)
        return value


def _here(ray: Any) -> Any:
    """A strategy that keeps an actor on this machine, which is lost last."""
    return ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=False
    )


class _Switch:
    """An actor that tells all tasks whether they shall stop."""

    def __init__(self) -> None:
        self.on = False

    def flip(self) -> None:
        self.on = True

    def is_on(self) -> bool:
        return self.on


def _paths(arguments: Any) -> Iterator[Path]:
    """All paths in nested arguments."""
    if isinstance(arguments, Path):
        yield arguments
    elif isinstance(arguments, Mapping | list | tuple):
        for value in arguments.values() if isinstance(arguments, Mapping) else arguments:
            yield from _paths(value)


def _own_modules(here: Path) -> list[Path]:
    """Sources of imported modules in the current folder, such as a user's reward; not DuoRL's, not installed ones."""
    files = [
        Path(file)
        for name, module in sys.modules.copy().items()  # at once: threads of Ray import meanwhile
        if (file := getattr(module, "__file__", None)) and name.partition(".")[0] not in ("duorl", "__main__")
    ]
    own = [file for file in files if file.is_relative_to(here) and not file.is_relative_to(sys.prefix)]
    return [file for file in own if file.suffix == ".py" and not file.name.startswith(PART)]
