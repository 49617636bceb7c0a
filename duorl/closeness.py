"""How close a prediction is to that of all-big, by the log probabilities of both: (K, N, V) and (1, N, V) to (K, N)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor
from torch.nn.functional import kl_div

Closeness = Callable[[Tensor, Tensor], Tensor]
Target = Literal["teacher", "text"]
"""What a prediction shall come close to: that of all-big, or the next token of the text."""


def minus_divergence(own: Tensor, teacher: Tensor) -> Tensor:
    """-KL(teacher || own), nats."""
    return -kl_div(own, teacher.expand_as(own), reduction="none", log_target=True).sum(-1)


def same_token(own: Tensor, teacher: Tensor) -> Tensor:
    """1 where both have the same most likely token, else 0: where greedy decoding accepts a draft."""
    return (own.argmax(-1) == teacher.argmax(-1)).to(own.dtype)


def overlap(own: Tensor, teacher: Tensor) -> Tensor:
    """The probability that sampling accepts a draft: the sum of min(p, q) (Leviathan et al. 2023, corollary 3.6)."""
    return own.minimum(teacher).exp().sum(-1)
