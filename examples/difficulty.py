"""Gains weighted by how hard a token is.

Most tokens are easy and gain little from compute, whatever the route. Here a nat gained on a hard token counts more, so
that routers spend on hard text first.

    python train.py --reward examples.difficulty.HardTokens --reward.price 0.3 --reward.power 1

This changes the objective: the best router under it is not the one with the best mean loss at its price, and the
comparison, which weighs all tokens alike, will say so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from duorl.rewards import LossImprovement, Step


class HardTokens(LossImprovement):
    """weight * gain - price * compute.

    Args:
        price: what an all-big pass costs, in nats; at least 0.
        power: of the reference loss in the weight; at least 0, where all tokens weigh the same.
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
    """(N,): reference_loss ** power over its mean: weights that average 1, so that the price keeps its scale.

    No router can talk a token hard: the reference route's loss does not depend on it. One token alone always
    weighs 1, so train on many at once, as all agents do.
    """
    powered = reference_loss**power
    return powered / powered.mean()
