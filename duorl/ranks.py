"""Ranks: the processes of one training, as `torchrun` and `accelerate launch` start them.

Every rank makes the same router and rolls out its own windows. Gradients are averaged, so the routers stay equal. What
is random is drawn by every rank for all of them, from equal generators, and every rank takes its part: two ranks learn
what one process learns from twice the windows. Rank 0 writes and measures. A process that was started alone is rank 0
of 1, and nothing here costs it anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch import Tensor
from torch import distributed as dist


def rank() -> int:
    """The number of this process among the ranks."""
    return int(os.environ.get("RANK", 0))


def count() -> int:
    """Number of ranks."""
    return int(os.environ.get("WORLD_SIZE", 1))


def first() -> bool:
    """Whether this is rank 0, which writes and measures."""
    return rank() == 0


def local() -> int:
    """The number of this process among those of its machine: its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def connect() -> None:
    """Connect the ranks; it waits for all of them. On a machine with fewer GPUs than ranks, processors compute."""
    if count() > 1 and not dist.is_initialized():
        here = int(os.environ.get("LOCAL_WORLD_SIZE", count()))
        a_gpu_each = here <= torch.cuda.device_count()
        if a_gpu_each:
            torch.cuda.set_device(local())
        dist.init_process_group("cpu:gloo,cuda:nccl" if a_gpu_each else "gloo")


def wait() -> None:
    """Wait until all ranks are here: what rank 0 has written is there for all."""
    if count() > 1:
        dist.barrier()


def own(values: Tensor) -> Tensor:
    """This rank's part of what was drawn for all: (R * N, ...) to (N, ...)."""
    return values.unflatten(0, (count(), -1))[rank()]


def mean(value: Tensor) -> Tensor:
    """The mean over ranks. Its derivative is that of this rank's value: gradients are averaged later."""
    if count() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return value + (total / count() - value.detach())


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace the gradients of parameters by their means over ranks."""
    if count() == 1:
        return
    parameters = list(parameters)
    flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = (gradient / count()).view_as(parameter)


def averaged(numbers: dict[str, float]) -> dict[str, float]:
    """The means over ranks of numbers by name; all ranks have the same names."""
    if count() == 1:
        return numbers
    values = torch.tensor(list(numbers.values()), dtype=torch.float64)
    dist.all_reduce(values)
    return dict(zip(numbers, (values / count()).tolist(), strict=True))


def joined(values: Tensor) -> Tensor:
    """The parts (n, ...) of all ranks one after the other; n may differ."""
    if count() == 1:
        return values
    sizes = torch.zeros(count(), dtype=torch.int64)
    sizes[rank()] = len(values)
    dist.all_reduce(sizes)
    padded = values.new_zeros(int(sizes.max()), *values.shape[1:])
    padded[: len(values)] = values
    parts = [torch.empty_like(padded) for _ in range(count())]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes.tolist(), strict=True)])


def any_of(flag: bool) -> bool:
    """Whether the flag is set on some rank."""
    if count() == 1:
        return flag
    flags = torch.tensor(int(flag))
    dist.all_reduce(flags)
    return bool(flags)


def of_first(text: str) -> str:
    """The text of rank 0."""
    if count() == 1:
        return text
    size = torch.tensor(len(text.encode()))
    dist.broadcast(size, 0)
    content = (
        torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) if first() else torch.empty(int(size)).byte()
    )
    dist.broadcast(content, 0)
    return bytes(content.tolist()).decode()
