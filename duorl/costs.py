"""What routing costs, in FLOPs read off the modules' own weights; nothing here is typed in.

One multiply-add counts as two FLOPs. *Compute* is the share of all-big's feed-forward FLOPs
that a route spends: 0 for all-skip, 1 for all-big.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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


def action_compute(ffns: Iterable[tuple[nn.Module, nn.Module]]) -> Tensor:
    """Compute of every action in every layer.

    Args:
        ffns: per layer its (small, big) networks.

    Returns:
        Shape (L, 3), float32: the share of all-big's FFN FLOPs that skip, small and big cost there.
        The column of big sums to 1.
    """
    flops = torch.tensor([[0, linear_flops(small), linear_flops(big)] for small, big in ffns], dtype=torch.float64)
    return (flops / flops[:, BIG].sum()).float()


def attention_flops(attention: nn.Module, width: int, context_length: float) -> float:
    """FLOPs of one token in one attention block: its projections, and scores and sums over the context.

    Args:
        attention: the block; its weight matrices are the projections.
        width: heads times head size.
        context_length: mean number of positions attended to.
    """
    return linear_flops(attention) + 4 * width * context_length
