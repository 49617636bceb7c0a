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
