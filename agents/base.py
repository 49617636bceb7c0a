"""Agent: a learner that uses reinforcement learning, in a `Lockstep` environment."""

from __future__ import annotations

from typing import Any

from duorl.envs.lockstep import Lockstep
from duorl.learners import HeadLearner


class Agent(HeadLearner):
    """Learns from episodes; in each update, all tokens of some windows play one episode in parallel.

    Args:
        env: the environment; its seed also starts the weights and the sampled actions.
        options: see `HeadLearner`.
    """

    env: Lockstep

    def __init__(self, env: Lockstep, **options: Any):
        super().__init__(env, **options)


def refuse_budget(env: Lockstep, name: str) -> None:
    """Refuse a hard budget, for learners that cannot mask actions.

    Raises:
        ValueError: the environment has one.
    """
    if env.big_layers is not None:
        others = "MaskablePPO, REINFORCE, ReinMax or GFlowNet"
        raise ValueError(f"{name} cannot keep big_layers {env.big_layers}: use {others}")
