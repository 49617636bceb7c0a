"""Returns, baselines and explained variance: pure functions, one equation each.

Tensor conventions: rewards and everything derived from them have shape (L, N), layer decisions by tokens. With groups
of K copies, the token axis is (K, B * T), flattened.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rewards_to_go(rewards: Tensor) -> Tensor:
    """G_l = r_l + r_{l+1} + ... + r_{L-1}, undiscounted: (L, N) to (L, N)."""
    return rewards.flip(0).cumsum(0).flip(0)


def leave_one_out(values: Tensor, group_size: int) -> Tensor:
    """The mean over the other K - 1 copies of the same token (Kool et al. 2019, eq. 8), an unbiased baseline.

    Args:
        values: (L, N) with N = K * M.
        group_size: K, at least 2.

    Returns:
        Shape (L, N).

    Raises:
        ValueError: the group has no other copies.
    """
    if group_size < 2:
        raise ValueError("a leave-one-out baseline needs a group_size of at least 2: it uses a token's other copies")
    groups = values.view(len(values), group_size, -1)
    return ((groups.sum(1, keepdim=True) - groups) / (group_size - 1)).view_as(values)


def explained_variance(predicted: Tensor, actual: Tensor) -> float:
    """1 - Var(actual - predicted) / Var(actual): 1 is perfect, 0 is as good as a constant; nan without variance."""
    variance = actual.var()
    return float("nan") if variance == 0 else float(1 - (actual - predicted).var() / variance)


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of softmax policies: (..., A) to (...). Masked actions (-inf) add nothing."""
    log_shares = torch.log_softmax(logits, dim=-1)
    return -(log_shares.exp() * log_shares.clamp(min=torch.finfo(logits.dtype).min)).sum(-1)
