"""Smooth routes: every change of network from one layer to the next costs a little.

A device that fetches a network's weights when it is called likes routes in long stretches. This also shows how a reward
looks back: `step.previous` is the decision of the layer before, None at the first.

    python train.py --reward examples.smooth.SmoothRoutes --reward.price 0.3 --reward.charge 0.01
"""

from __future__ import annotations

from torch import Tensor

from duorl.rewards import LossImprovement, Step


class SmoothRoutes(LossImprovement):
    """The default reward, less a charge for every layer that is not routed like the one before.

    Args:
        price: what an all-big pass costs, in nats; at least 0.
        charge: nats per change.
    """

    def __init__(self, price: float = 0.1, charge: float = 0.01):
        super().__init__(price)
        self.charge = charge

    def __call__(self, step: Step) -> Tensor:
        """(N,) nats."""
        earned = super().__call__(step)
        if step.previous is None:
            return earned
        return earned - self.charge * (step.action != step.previous.action)
