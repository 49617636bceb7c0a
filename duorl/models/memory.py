"""Keys and values that an earlier pass leaves behind, for passes in the reference context to read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor


@dataclass
class Memory:
    """Keys and values that earlier passes left behind, and who reads them.

    Attributes:
        positions: (B, P), of the tokens that read.
        stored: per layer the keys and values of S positions, each (B, H, S, k).
        mode: what attention does with it: `record` an ordinary pass, `read`, or read and `commit` the readers' own keys
            and values to their positions.
        length: number of stored positions that are looked at; all unless given.
    """

    positions: Tensor
    stored: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    mode: Literal["record", "read", "commit"] = "read"
    length: int | None = None

    def looked_at(self, layer: int) -> tuple[Tensor, Tensor]:
        """The keys and values that are read in a layer, each (B, H, `length`, k)."""
        keys, values = self.stored[layer]
        return keys[:, :, : self.length], values[:, :, : self.length]

    def commit(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Overwrite those at `positions` with (B, H, P, k)."""
        index = self.positions[:, None, :, None].expand_as(key)
        for states, own in zip(self.stored[layer], (key, value), strict=True):
            states.scatter_(2, index, own)


_active: ContextVar[Memory | None] = ContextVar("memory", default=None)
active_memory = _active.get


@contextmanager
def remembering(memory: Memory | None) -> Iterator[None]:
    """Let attention inside record into or read from `memory`; None is ordinary attention."""
    token = _active.set(memory)
    try:
        yield
    finally:
        _active.reset(token)
