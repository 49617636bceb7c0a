"""Runs jobs in several processes. They share the machine's cores, because more threads than cores are slow."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from duorl.runs import interrupts
from duorl.runs.channel import Channel, Lost, Message, Said, Stopped, answer
from duorl.runs.jobs import Function

_SPAWN = multiprocessing.get_context("spawn")
_EVERY = 0.1  # seconds between two messages of a job about its progress


class SideBySide(Channel):
    """Runs jobs in processes, each one job after the other. If a process dies, only its job fails.

    Args:
        slots: number of processes.
        threads: threads of torch in each process.
    """

    def __init__(self, slots: int, threads: int):
        super().__init__()
        self.slots, self.threads = slots, threads
        self._all: set[_Worker] = set()
        self._idle: list[_Worker] = []

    def messages(self, function: Function, arguments: dict[str, Any]) -> Generator[Message, None, None]:
        """Run a job in a free process or in a new one; see `Channel.messages`."""
        worker = self._take()
        try:
            yield from worker.messages(function, arguments)
        finally:
            self._give_back(worker)

    def stop(self, *, at_once: bool = False) -> None:
        """Send SIGTERM (once) or SIGKILL to all processes."""
        with self.lock:
            for worker in self._all:
                if at_once:
                    worker.process.kill()
                elif not self.stopping:
                    worker.process.terminate()
            self.stopping = True

    def close(self) -> None:
        """End the free processes."""
        with self.lock:
            while self._idle:
                self._idle.pop().end()

    def _take(self) -> _Worker:
        with self.lock:
            if self.stopping:
                raise interrupts.Interrupted(signal.SIGTERM)
            if self._idle:
                return self._idle.pop()
            worker = _Worker(self.threads)
            self._all.add(worker)
            return worker

    def _give_back(self, worker: _Worker) -> None:
        with self.lock:
            if worker.process.is_alive() and not worker.busy:
                self._idle.append(worker)
            else:
                worker.process.kill()
                worker.end()
                self._all.discard(worker)


class _Worker:
    """A process and the connection to it.

    Attributes:
        busy: whether it has a job.
    """

    def __init__(self, threads: int):
        self.busy = False
        self.connection, theirs = _SPAWN.Pipe()
        self.process: SpawnProcess = _SPAWN.Process(target=_serve, args=(theirs, threads))
        # Both signals are blocked until the process can handle them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, interrupts.SIGNALS)
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()

    def messages(self, function: Function, arguments: dict[str, Any]) -> Generator[Message, None, None]:
        """Run a job in the process."""
        self.busy = True
        try:
            self.connection.send((function, arguments))
            while self.busy:
                message = self.connection.recv()
                self.busy = isinstance(message, Said)
                yield message
        except (EOFError, OSError):
            self.process.join()
            yield Lost(f"its process died ({_death(self.process.exitcode)})")

    def end(self) -> None:
        """End the process."""
        self.connection.close()
        self.process.join()


def _death(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"{name}, perhaps out of memory" if name == "SIGKILL" else name


def _serve(connection: Connection, threads: int) -> None:
    """The loop of the process: one job after the other."""
    _follow_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the main process sends SIGTERM for it
    try:
        with interrupts.listening(ignore=signal.SIGINT):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, interrupts.SIGNALS)
            prepare(threads)
            while True:
                function, arguments = connection.recv()
                with interrupts.deferred():
                    connection.send(answer(function, arguments, connection.send, _EVERY))
    except interrupts.Interrupted as stop:  # between two jobs, or at once after a second signal
        with contextlib.suppress(OSError):
            connection.send(Stopped(stop.signum))
    except (EOFError, OSError):
        return


def prepare(threads: int) -> None:
    """Prepare a process for jobs with a number of torch's threads."""
    import torch

    from duorl.runs.allocator import keep_freed_memory

    keep_freed_memory()
    torch.set_num_threads(threads)


def _follow_parent() -> None:
    """End when the parent ends, also after a kill."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
