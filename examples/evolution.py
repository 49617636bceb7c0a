"""Example of a learner: evolution strategies (Salimans et al. 2017), which need no gradient through the policy.

Every update adds noise to the router's weights, and then subtracts the same noise, on the same windows. It moves the
weights along the noise by the difference of the two returns. The class is one file outside of the package. It can be
trained, resumed and compared as every other learner:

    python train.py --agent examples.evolution.Evolution --agent.noise 0.05
    duorl compare --agents '{"Evolution": "examples.evolution.Evolution", "PPO": "PPO"}'
"""

from __future__ import annotations

import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from duorl.envs import Lockstep
from duorl.learners import HeadLearner


class Evolution(HeadLearner):
    """Evolution strategies with antithetic pairs, in the weights of a router with one head per layer.

    Args:
        env: the environment; its seed also starts the weights and draws the noise.
        noise: standard deviation of the noise, above 0.
        learning_rate: learning rate of Adam; it falls linearly to 0.
        width: hidden units of a head; 0 for linear heads.
        init: folder of a saved router to start from.
    """

    env: Lockstep
    stateful = ("optimizer", "generator")  # changed by training, beside the router: saved, and restored by --resume

    def __init__(
        self,
        env: Lockstep,
        *,
        noise: float = 0.05,
        learning_rate: float = 1e-2,
        width: int = 0,
        init: str | None = None,
    ):
        super().__init__(env, learning_rate=learning_rate, width=width, init=init)
        if not noise > 0:
            raise ValueError(f"noise must be above 0, not {noise}")
        self.noise = noise
        self.generator = torch.Generator().manual_seed(env.first_seed)

    def update(self) -> dict[str, float]:
        """One antithetic pair and one step of Adam; returns the metrics by tag."""
        weights = parameters_to_vector(self.router.parameters()).detach()
        noise = torch.randn(weights.shape, generator=self.generator).to(weights)
        place, returns = self.env.state(), []
        for sign in (1, -1):
            self.env.restore(place)  # the same windows both times
            vector_to_parameters(weights + sign * self.noise * noise, self.router.parameters())
            returns.append(self._play())
        vector_to_parameters(weights, self.router.parameters())
        slope = (returns[0] - returns[1]) / (2 * self.noise)
        self.descend(-slope * (parameters_to_vector(self.router.parameters()) @ noise))
        return self.env.outcome.metrics()

    @torch.no_grad()
    def _play(self) -> float:
        """The mean return of an episode of all tokens with the most probable actions."""
        self.env.draw()
        while not self.env.done:
            self.env.step(self.router.logits(self.env.view).argmax(-1))
        return self.env.outcome.rewards.sum(0).mean().item()
