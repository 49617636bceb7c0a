"""What benchmarks/soak.py disturbs runs with: processes that it kills, a disk that fills up, damaged checkpoints, and
machines of a cluster that are lost.

    python -m benchmarks.soak --minutes 6 --scale 0.1 --every 20 30

This file only does the damage; what DuoRL owes after it is checked in benchmarks/soak.py.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import time
from pathlib import Path
from typing import Any

from duorl.runs.jobs import CHECKPOINT, RESULT

_WORKERS = ("spawn_main", "ray::work")  # in the command lines of processes here and of tasks on a cluster
_BLOCK = 2**20
_FLIPPED = 16  # bytes
_APART = 5.0  # seconds between the loss of a machine and the next one


def descendants(pid: int) -> list[int]:
    """The processes that a process started, and those that these started."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found, new = [], [pid]
    while new:
        new = [child for child, parent in parents.items() if parent in new]
        found += new
    return sorted(found)


def workers(pid: int) -> list[int]:
    """Those of a process's descendants that do jobs."""
    return [child for child in descendants(pid) if any(sign in _command(child) for sign in _WORKERS)]


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:  # it has ended
        return ""


def unfinished(run: Path) -> list[Path]:
    """The checkpoints of the jobs of a run that are not finished."""
    return [path for path in sorted(run.rglob(CHECKPOINT)) if not (path.parent / RESULT).exists()]


def truncate(path: Path, draw: random.Random) -> None:
    """Cut off the end of a file."""
    os.truncate(path, draw.randrange(1, path.stat().st_size))


def flip(path: Path, draw: random.Random) -> None:
    """Flip all bits of some bytes of a file."""
    content = bytearray(path.read_bytes())
    for place in draw.sample(range(len(content)), _FLIPPED):
        content[place] ^= 0xFF
    path.write_bytes(content)


def empty(path: Path, draw: random.Random) -> None:
    """Leave a file without content."""
    path.write_bytes(b"")


class Disk:
    """A small disk for runs, which can be filled; without the right to mount one, an ordinary folder.

    Args:
        folder: where it is mounted.
        megabytes: its size.

    Attributes:
        small: whether it is a disk of its own.
    """

    def __init__(self, folder: Path, megabytes: int):
        self.folder = folder
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
        try:
            self.small = subprocess.run(mount, capture_output=True).returncode == 0
        except FileNotFoundError:
            self.small = False

    @property
    def _filler(self) -> Path:
        return self.folder / "filler"

    def fill(self) -> None:
        """Take all free space."""
        assert self.small, "it would fill the disk of the machine"
        with self._filler.open("wb", buffering=0) as file:
            size = _BLOCK
            while size:
                try:
                    file.write(bytes(size))
                except OSError:
                    size //= 2

    def free(self) -> None:
        """Give it back."""
        self._filler.unlink(missing_ok=True)

    def close(self) -> None:
        """Unmount it."""
        if self.small:
            subprocess.run(["umount", str(self.folder)], check=False)


class Machines:
    """A Ray cluster of two nodes on this machine, each with one core; the second one can be lost."""

    def __init__(self) -> None:
        os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}  # by default, others go first
        from ray.cluster_utils import Cluster

        self._node = {"num_cpus": 1, "object_store_memory": 100_000_000}
        self._cluster: Any = Cluster(initialize_head=True, head_node_args=self._node)
        self._second = self._cluster.add_node(**self._node)

    @property
    def address(self) -> str:
        """HOST:PORT of the head."""
        return self._cluster.address

    def lose(self) -> None:
        """Kill the second node, and add another one after some seconds."""
        self._cluster.remove_node(self._second, allow_graceful=False)
        time.sleep(_APART)
        self._second = self._cluster.add_node(**self._node)

    def close(self) -> None:
        """End all nodes."""
        self._cluster.shutdown()
