"""Example of a reward: smooth routes. Every change of the network between two layers has a charge.

Such routes are useful on a device that loads the weights of a network when it is used. The example also shows how a
reward uses an earlier decision: `step.previous` is the decision in the layer before, None in the first layer.

    python train.py --reward examples.smooth.SmoothRoutes --reward.price 0.3 --reward.charge 0.01
"""

from __future__ import annotations

from torch import Tensor

from duorl.rewards import LossImprovement, Step


class SmoothRoutes(LossImprovement):
    """The default reward, minus a charge for every layer with another action than the layer before.

    Args:
        price: price of an all-big pass, in nats; at least 0.
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
