"""Stored keys and values of an earlier pass, which passes in the reference context read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from duorl.models.scoped import Scoped


@dataclass
class Memory:
    """Stored keys and values of earlier passes, and how attention uses them.

    Attributes:
        positions: (B, P), positions of the tokens that read the memory.
        stored: for each layer the keys and values of S positions, each (B, H, S, k).
        mode: `record`: store the keys and values of an ordinary pass; `read`: read them; `commit`: read them, and store
            the readers' own keys and values at their positions.
        length: number of stored positions that are read; by default all.
        bias: (1 or H, S), what attention adds to the scores of each stored position; for `duorl.models.past` only.
    """

    positions: Tensor
    stored: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    mode: Literal["record", "read", "commit"] = "read"
    length: int | None = None
    bias: Tensor | None = None

    def looked_at(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values that are read in a layer, each (B, H, `length`, k)."""
        keys, values = self.stored[layer]
        return keys[:, :, : self.length], values[:, :, : self.length]

    def commit(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Store keys and values (B, H, P, k) at `positions`."""
        index = self.positions[:, None, :, None].expand_as(key)
        for states, own in zip(self.stored[layer], (key, value), strict=True):
            states.scatter_(2, index, own)


_memory: Scoped[Memory] = Scoped("memory")
active_memory, remembering = _memory.get, _memory.having
"""The memory that attention uses in this thread, or None; and a block in which it uses one."""
