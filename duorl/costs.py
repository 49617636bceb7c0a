"""FLOPs of routes, computed from the shapes of the weights.

One multiply-add counts as two FLOPs. *Compute* is the FLOPs in the FFNs of a route divided by those of all-big: 0 for
all-skip, 1 for all-big.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

ACTIONS = ("skip", "small", "big")
SKIP, SMALL, BIG = range(3)


def action_ids(actions: Sequence[str]) -> Tensor:
    """The integer codes of named actions.

    Args:
        actions: names from `ACTIONS`, each once.

    Returns:
        Shape (A,), int64, ascending: skip 0, small 1, big 2.

    Raises:
        ValueError: the set is empty, or a name in it is unknown or repeated.
    """
    unknown = [name for name in actions if name not in ACTIONS]
    if unknown:
        raise ValueError(f"unknown action {unknown[0]!r}: choose from {', '.join(ACTIONS)}")
    if not actions or len(set(actions)) < len(actions):
        raise ValueError(f"actions must name at least one action, each once, not {list(actions)}")
    return torch.tensor(sorted(ACTIONS.index(name) for name in actions))


def linear_flops(module: nn.Module) -> int:
    """FLOPs of one token in all weight matrices of `module`, without biases and activations.

    Linear maps are counted by their sizes, because quantized ones have packed weights, or no parameters at all.
    """
    seen: set[int] = set()
    total, parts = 0, cast(Iterable[Any], module.modules())
    for part in parts:
        if hasattr(part, "in_features") and hasattr(part, "out_features"):
            total += part.in_features * part.out_features
            seen.update(map(id, part.parameters()))
    return 2 * (total + sum(p.numel() for p in module.parameters() if p.ndim >= 2 and id(p) not in seen))


@dataclass(frozen=True)
class Flops:
    """FLOPs of one token in each part of a duo model.

    Attributes:
        projections: (L,), weight matrices of each attention block.
        width: number of heads times head size. Each attended position costs 4 * width, for its score and its value.
        ffns: (L, 3), networks by action: skip, small, big.
        head: the prediction over the vocabulary.
    """

    projections: Tensor
    width: int
    ffns: Tensor
    head: int

    @cached_property
    def compute(self) -> Tensor:
        """Compute of each action in each layer, as a share of all-big: (L, 3); big sums to 1."""
        return (self.ffns / self.ffns[:, BIG].sum()).float()

    def attention(self, layer: int, context_length: float) -> float:
        """FLOPs of one attention block over a (mean) number of positions."""
        return self.projections[layer].item() + 4 * self.width * context_length

    def token(self, compute: Tensor, context_length: float) -> Tensor:
        """FLOPs of a whole pass with attention and head, from its compute in [0, 1], any shape."""
        attention = sum(self.attention(layer, context_length) for layer in range(len(self.projections)))
        return attention + self.head + compute * self.ffns[:, BIG].sum().item()


class Tally:
    """Counts the FLOPs of passes; all passes of a search share one."""

    def __init__(self) -> None:
        self.flops = 0.0
