"""Agent: trains a router by reinforcement in a `Lockstep` of tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

from duorl.routers import HeadRouter, PatternRouter, Router, load
from duorl.routers.heads import LayerHeads
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
        init: folder of a saved router to start from, whose sizes then count; None for a fresh one.

    Raises:
        ValueError: the saved router is not one of heads for this environment.
    """

    def __init__(self, env: Lockstep, width: int, init: str | None = None):
        self.env = env
        fresh = HeadRouter(
            env.layers,
            env.model.hidden_size,
            env.actions,
            width=width,
            seed=env.first_seed,
            prices=env.prices,
            signals=env.signals,
        )
        self.router = (fresh if init is None else _saved(init, fresh)).to(env.model.device)

    def heads(self, outputs: int) -> LayerHeads:
        """Fresh heads on what the policy sees: a critic, with one output."""
        config = self.router.config
        return LayerHeads(
            self.env.layers,
            self.env.model.hidden_size,
            outputs,
            config["width"],
            torch.Generator().manual_seed(self.env.first_seed + 1),
            self.router.conditions,
        ).to(self.env.model.device)

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


class EpisodicAgent(Agent):
    """A learner that takes one gradient step per episode of all tokens, at a rate that falls linearly to 0."""

    optimizer: torch.optim.Optimizer
    learning_rate: float
    progress = 0.0  # of the training, in [0, 1)

    @abstractmethod
    def update(self) -> dict[str, float]:
        """One episode of all tokens and one gradient step; returns its metrics by tag."""

    def learn(self, total_decisions: int, monitor: Monitor | None = None) -> HeadRouter:
        """Train; see `Agent.learn`."""
        decisions = 0
        while decisions < total_decisions:
            self.progress = decisions / total_decisions
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate * (1 - self.progress)
            metrics = self.update()
            decisions += self.decisions_per_update
            if monitor:
                monitor(decisions, metrics, self.router)
        return self._finish()


def _saved(folder: str, fresh: HeadRouter) -> HeadRouter:
    """The router in a folder, where it can take the fresh one's place."""
    router = load(folder)
    if isinstance(router, PatternRouter):
        return fresh.leaning(router.config["route"])
    same = ("layers", "hidden_size", "actions", "prices", "signals")
    if not isinstance(router, HeadRouter) or any(router.config[key] != fresh.config[key] for key in same):
        expected = ", ".join(f"{key} {fresh.config[key]}" for key in same)
        raise ValueError(f"init {folder} holds a {type(router).__name__} that does not fit: this run needs {expected}")
    return router.requires_grad_(True)


def refuse_budget(env: Lockstep, name: str) -> None:
    """Learners whose choices cannot be ruled out do not take a hard budget.

    Raises:
        ValueError: the environment has one.
    """
    if env.big_layers is not None:
        raise ValueError(f"{name} cannot keep big_layers {env.big_layers}: use MaskablePPO, REINFORCE or GFlowNet")
