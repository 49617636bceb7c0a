"""Scores of many states, each made of large things, such as logits, that are not kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def each(score: Callable[[Tensor, Tensor], Tensor], parts: Iterable[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Scores of parts of a pass, whose logits are not kept."""
    return [_Scores.apply(score, *part) if part[0].requires_grad else score(*part) for part in parts]


class _Scores(torch.autograd.Function):
    """Scores of states (..., d), each from its own state: derivatives are made beside them, so logits are made once."""

    @staticmethod
    def forward(ctx, score: Callable[[Tensor, Tensor], Tensor], states: Tensor, others: Tensor) -> Tensor:
        with torch.enable_grad():
            inside = states.detach().requires_grad_()
            scores = score(inside, others)
            steps = not scores.requires_grad  # a step function of the states
            ctx.save_for_backward(torch.zeros_like(inside) if steps else torch.autograd.grad(scores.sum(), inside)[0])
        return scores.detach()

    @staticmethod
    def backward(ctx, slopes: Tensor) -> tuple[None, Tensor, None]:
        (own,) = ctx.saved_tensors
        return None, slopes[..., None].to(own.dtype) * own, None
