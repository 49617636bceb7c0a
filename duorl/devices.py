"""Where a model runs, in which precision, with how many threads, and how much memory this takes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from duorl import ranks

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
_WIDE = 512  # hidden size from which products, which bfloat16 halves, are most of a pass
_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUP = Path("/proc/self/cgroup")


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """Where a command runs its model.

    Args:
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`. `auto` is CUDA if the machine has it, else MPS, else the
            processor.
        dtype: precision of the model. `auto` is bfloat16 if the device computes in it and the hidden size is at least
            512, and float32 otherwise. Routers, losses and rewards are always in float32.
        threads: threads of torch, in every training process; by default all cores, shared by the processes.
    """

    device: str = "auto"
    dtype: Dtype = "auto"
    threads: int | None = None


DeviceMap = str | dict[str, int | str] | None
"""Where the parts of a model are: see `MapOptions`."""


@dataclass(frozen=True, kw_only=True)
class MapOptions(DeviceOptions):
    """Where a command runs its model, which may be larger than a device.

    Args:
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`. `auto` is CUDA if the machine has it, else MPS, else the
            processor.
        dtype: precision of the model. `auto` is bfloat16 if the device computes in it and the hidden size is at least
            512, and float32 otherwise. Routers, losses and rewards are always in float32.
        threads: threads of torch, in every training process; by default all cores, shared by the processes.
        device_map: `auto` puts as many layers as fit on GPUs, then into memory, and leaves the rest on the disk, as
            accelerate does it; or a device by name of the part (docs/how-to/machines.md). By default all is on one.
        max_memory: with a `device_map`, most memory by device, for instance `{"cpu": "8GB"}`.
    """

    device_map: DeviceMap = None
    max_memory: dict[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class TrainerDeviceOptions(DeviceOptions):
    """Where a command trains whole models, with the Trainer of transformers.

    Args:
        device: `auto`, `cpu`, `cuda` or `mps`; on `cuda`, all GPUs that are visible. `auto` is CUDA if the machine has
            it, else MPS, else the processor.
        dtype: mixed precision: layers compute in bfloat16 or float16, and weights, their updates and losses are
            float32. `auto` is what the options of the training say, by `bf16` and `fp16`; without them, float32.
        threads: threads of torch, in every training process; by default all cores, shared by the processes.
    """


def pick_device(name: str = "auto") -> torch.device:
    """The device of a name.

    Args:
        name: see `DeviceOptions`.

    Raises:
        ValueError: the name is unknown, or the machine has no such device.
    """
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if counts[kind])
    kind, colon, number = name.partition(":")
    if kind not in counts or (colon and not (kind == "cuda" and number.isdecimal())):
        raise ValueError(f"device must be auto, cpu, cuda, cuda:N or mps, not {name!r}")
    if kind == "cuda" and not colon and ranks.count() > 1:
        number, name = str(ranks.local()), f"cuda:{ranks.local()}"
    if int(number or 0) >= counts[kind]:
        there = [kind if kind != "cuda" else f"cuda:{n}" for kind, count in counts.items() for n in range(count)]
        raise ValueError(f"device {name} is not there: this machine has {', '.join(there)}")
    return torch.device(name)


def pick_trainers_device(name: str) -> torch.device:
    """The device of a name, which a Trainer takes too: it has no way to be given one GPU out of several."""
    device = pick_device(name)
    if ":" in name:
        visible = f"CUDA_VISIBLE_DEVICES={device.index}"
        raise ValueError(f"device {name}: a Trainer takes all GPUs that are visible: set {visible}, and give cuda")
    return device


def pick_dtype(name: Dtype, device: torch.device, width: int) -> torch.dtype:
    """The precision of a name.

    Args:
        name: see `DeviceOptions`.
        device: the device of the model.
        width: the model's hidden size.
    """
    if name == "auto":
        return torch.bfloat16 if width >= _WIDE and _computes_bfloat16(device) else torch.float32
    return getattr(torch, name)


def _computes_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for products in bfloat16; without them, bfloat16 is slower than float32."""
    if device.type == "cpu":
        known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older releases of torch do not tell
        return any(there for name, there in known.items() if "bf16" in name)
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def processes_for(device: torch.device, threads: int | None) -> int:
    """Number of trainings at the same time, if none is given: as many as the processor has cores for, one elsewhere."""
    if device.type != "cpu":
        return 1
    return torch.get_num_threads() if threads is None else max(1, (os.cpu_count() or 1) // threads)


def threads_for(processes: int, threads: int | None) -> int:
    """Threads of torch in each of several processes: the given number, or a share of the present one."""
    return threads or max(1, torch.get_num_threads() // processes)


def free_bytes(device: torch.device) -> int:
    """Bytes that a device can still give.

    Beside a processor this is what the machine has available, or what is left of the limit of a container or of a job
    of a cluster, if that is less. Both count files in memory that the system can drop as free.

    Args:
        device: `cpu`, `cuda` or `mps`.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return max(0, min([_available(), *_left_in_groups()]))


@dataclass(frozen=True)
class _Accounts:
    """Files of a control group about its memory, in one of the two versions of control groups.

    Attributes:
        root: folder of the group of all.
        controller: its name in /proc/self/cgroup.
        limits: files with a number of bytes, or `max`. Above `memory.high` the system slows the group down.
        used: file with the bytes in use, the cached files included.
        dropped: the row of memory.stat with the cached files that can be dropped.
    """

    root: Path
    controller: str
    limits: tuple[str, ...]
    used: str
    dropped: str


def _left_in_groups() -> Iterator[int]:
    """Bytes that are left in each control group with a limit: that of this process, and those around it."""
    for accounts in (
        _Accounts(_GROUPS, "", ("memory.max", "memory.high"), "memory.current", "inactive_file"),
        _Accounts(
            _GROUPS / "memory", "memory", ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"
        ),
    ):
        for place in _group_folders(accounts):
            limits = [limit for name in accounts.limits if (limit := _number(_text(place / name))) is not None]
            used = _number(_text(place / accounts.used))
            if limits and used is not None:
                rows = dict(row.split() for row in _text(place / "memory.stat").splitlines())
                yield min(limits) - used + int(rows.get(accounts.dropped, 0))


def _group_folders(accounts: _Accounts) -> Iterator[Path]:
    """The folders of the groups from the outermost to that of this process; in a container, only the first is there."""
    own = ""
    for row in _text(_OWN_GROUP).splitlines():
        _, controllers, path = row.split(":", 2)
        if accounts.controller in controllers.split(","):
            own = path
    place = accounts.root
    yield place
    for part in own.strip("/").split("/"):
        place = place / part
        yield place


def _text(path: Path) -> str:
    """Content of a file of the system; empty if there is none, or it may not be read."""
    try:
        return path.read_text() if path.is_file() else ""
    except OSError:
        return ""


def _number(text: str) -> int | None:
    return int(text) if text.strip().isdecimal() else None


def _available() -> int:
    for line in _text(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def require_memory(needed: float, device: torch.device, what: str, fix: str) -> None:
    """Refuse what does not fit into a device's free memory.

    Raises:
        ValueError: says what needs how much, and what to change.
    """
    free = free_bytes(device)
    if needed > free:
        size = f"about {_size(needed)}, and {device} has {_size(free)} free"
        raise ValueError(f"{what} do not fit into memory: they take {size}; {fix}")


def _size(count: float) -> str:
    """A number of bytes in words."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
