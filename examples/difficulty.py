"""Example of a reward: gains are weighted by the reference loss of the token.

Most tokens are easy and gain little from compute on every route. Here, a gain of one nat counts more if the reference
loss is large. So routers use more compute for hard tokens.

    python train.py --reward examples.difficulty.HardTokens --reward.price 0.3 --reward.power 1

This changes what agents maximize. The comparison weights all tokens equally, so it may show a lower return for this
router.
"""

from __future__ import annotations

import torch
from torch import Tensor

from duorl.rewards import LossImprovement, Step


class HardTokens(LossImprovement):
    """weight * gain - price * compute.

    Args:
        price: price of an all-big pass, in nats; at least 0.
        power: power of the reference loss in the weight; at least 0. With 0, all tokens have the same weight.
    """

    def __init__(self, price: float = 0.1, power: float = 1.0):
        super().__init__(price)
        if power < 0:
            raise ValueError(f"power must be at least 0, not {power}")
        self.power = power

    def __call__(self, step: Step) -> Tensor:
        """(N,) nats."""
        return self.contextual(step) - self.price * step.compute

    def contextual(self, step: Step) -> Tensor:
        """(N,) nats: the weighted gain."""
        if step.reference_loss is None:
            return torch.zeros_like(step.compute)
        return weights(step.reference_loss, self.power) * step.gain


def weights(reference_loss: Tensor, power: float) -> Tensor:
    """(N,): reference_loss ** power divided by its mean. The mean weight is 1, so the price keeps its scale.

    The reference loss does not depend on the router, so the router cannot change the weights. With a single token, the
    weight is always 1; agents train on many tokens in parallel.
    """
    powered = reference_loss**power
    return powered / powered.mean()
