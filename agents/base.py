"""Agent: trains a router by reinforcement in a `Lockstep` of tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from duorl.routers import HeadRouter, Router
from envs.lockstep import Lockstep

Monitor = Callable[[int, dict[str, float], Router], None]
"""Called once per update with the layer decisions so far, metrics by TensorBoard tag, and the router."""


class Agent(ABC):
    """A learner over one environment.

    All agents report the same tags over the same axis, layer decisions (see docs/metrics.md), so that their
    curves lie over each other.

    Args:
        env: tokens in lockstep; its seed also starts the weights and the sampled actions.
        width: hidden units of the policy's heads; 0 for linear ones.
    """

    def __init__(self, env: Lockstep, width: int):
        self.env = env
        self.router = HeadRouter(env.layers, env.model.hidden_size, env.actions, width, env.first_seed).to(
            env.model.device
        )

    @property
    def decisions_per_update(self) -> int:
        """Layer decisions in one episode of all tokens: L * N."""
        return self.env.layers * self.env.num_tokens

    @abstractmethod
    def learn(self, total_decisions: int, monitor: Monitor | None = None) -> HeadRouter:
        """Train.

        Args:
            total_decisions: layer decisions to learn from, rounded up to whole updates.
            monitor: told after every update.

        Returns:
            The trained router, frozen.
        """

    def _finish(self) -> HeadRouter:
        return self.router.eval().requires_grad_(False)
