"""The reference context of families whose attention bypasses the attention interface, through their cache.

Attention of Falcon and Bloom computes its scores itself, but takes its keys from a cache and what it hides from a mask.
So a pass in the reference context gets a cache that puts the S stored keys and values in front of the P own ones, and a
mask in which position t sees the stored ones before t, and itself. It costs more than `duorl.models.attention`: the
stored keys are copied for every branch, and each query has S + P scores.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from duorl.models.calls import Arguments
from duorl.models.families import Family
from duorl.models.memory import Memory


class _Past:
    """What attention takes for a cache: it records keys and values in a memory, or reads them from it."""

    def __init__(self, memory: Memory):
        self.memory = memory

    def update(self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Own keys and values (n * B, H, P, k) to all that a query may read, (n * B, H, S + P, k)."""
        if self.memory.mode == "record":
            self.memory.stored[layer] = key.contiguous(), value.contiguous()
            return key, value
        if self.memory.mode == "commit":
            self.memory.commit(layer, key, value)
        keys, values = self.memory.looked_at(layer)
        copies = len(key) // len(keys), 1, 1, 1
        return torch.cat([keys.repeat(copies), key], dim=2), torch.cat([values.repeat(copies), value], dim=2)


def through_cache(family: Family, memory: Memory, hidden: Tensor, arguments: Arguments) -> Arguments:
    """Arguments of a layer with which it uses a memory.

    Args:
        family: one with a `cache_argument`.
        memory: it is recorded, read or committed to.
        hidden: (n * B, P, d), what the layer is called with.
        arguments: those of a pass without a memory.
    """
    args, given = arguments
    own: dict[str, Any] = {family.cache_argument: _Past(memory)}
    bias = given.get(family.bias_argument)
    if memory.mode == "record":
        # The last query sees all: its row of the mask has no position hidden, only ALiBi if the mask holds it.
        row = given["attention_mask"][0, :, -1] if bias is None else bias[: len(bias) // len(hidden), 0]
        memory.bias = torch.zeros_like(row, dtype=hidden.dtype) if row.dtype == torch.bool else row
    else:
        own["attention_mask"] = _mask(memory).repeat(len(hidden) // len(memory.positions), 1, 1, 1)
        if bias is not None:
            own[family.bias_argument] = torch.zeros_like(bias[..., :1])  # it is in the mask
    return args, {**given, **own}


def _mask(memory: Memory) -> Tensor:
    """What is added to the scores of the S stored positions and the P own ones: (B, 1 or H, P, S + P)."""
    assert memory.bias is not None
    bias, positions = memory.bias[:, : memory.length], memory.positions
    stored = positions[:, :, None] <= torch.arange(bias.shape[1], device=bias.device)  # (B, P, S), hidden
    own = ~torch.eye(positions.shape[1], dtype=torch.bool, device=bias.device).expand(len(positions), -1, -1)
    own_bias = memory.bias[:, positions].transpose(0, 1)
    added = torch.cat([bias.expand(len(positions), -1, -1), own_bias], dim=2)  # (B, 1 or H, S + P)
    return added[:, :, None].masked_fill(torch.cat([stored, own], dim=2)[:, None], torch.finfo(bias.dtype).min)
