"""What routing costs, in FLOPs read off the modules' own weights; nothing here is typed in.

One multiply-add counts as two FLOPs. *Compute* is the share of all-big's feed-forward FLOPs
that a route spends: 0 for all-skip, 1 for all-big.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

ACTIONS = ("skip", "small", "big")
SKIP, SMALL, BIG = range(3)


def action_ids(actions: Sequence[str]) -> Tensor:
    """The integer codes of named actions.

    Args:
        actions: names out of `ACTIONS`, without repetition.

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
    """FLOPs of one token through all weight matrices of `module` (biases and activations left out)."""
    return 2 * sum(p.numel() for p in module.parameters() if p.ndim >= 2)


@dataclass(frozen=True)
class Flops:
    """FLOPs of one token in each part of a duo model.

    Attributes:
        projections: (L,), an attention block's weight matrices.
        width: heads times head size: each position attended to costs 4 * width more, for its score and its value.
        ffns: (L, 3), the networks by action: skip, small, big.
        head: the prediction over the vocabulary.
    """

    projections: Tensor
    width: int
    ffns: Tensor
    head: int

    @property
    def compute(self) -> Tensor:
        """The share of all-big's FFN FLOPs that each action costs in each layer: (L, 3); big sums to 1."""
        return (self.ffns / self.ffns[:, BIG].sum()).float()

    def attention(self, layer: int, context_length: float) -> float:
        """One attention block over a (mean) number of positions."""
        return self.projections[layer].item() + 4 * self.width * context_length

    def token(self, compute: Tensor, context_length: float) -> Tensor:
        """A whole pass, attention and head included, by its compute: any shape, in [0, 1]."""
        attention = sum(self.attention(layer, context_length) for layer in range(len(self.projections)))
        return attention + self.head + compute * self.ffns[:, BIG].sum().item()


class Tally:
    """FLOPs that passes have executed so far; one is shared by all passes of a search."""

    def __init__(self) -> None:
        self.flops = 0.0
