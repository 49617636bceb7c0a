"""Agent: a learner that learns by reinforcement, in a `Lockstep` of tokens."""

from __future__ import annotations

from duorl.envs.lockstep import Lockstep
from duorl.learners import HeadLearner


class Agent(HeadLearner):
    """Learns from episodes of all tokens in lockstep, one per update.

    Args:
        env: tokens in lockstep; its seed also starts the weights and the sampled actions.
        options: see `HeadLearner`.
    """

    env: Lockstep

    def __init__(self, env: Lockstep, **options):
        super().__init__(env, **options)


def refuse_budget(env: Lockstep, name: str) -> None:
    """Learners whose choices cannot be ruled out do not take a hard budget.

    Raises:
        ValueError: the environment has one.
    """
    if env.big_layers is not None:
        others = "MaskablePPO, REINFORCE, ReinMax or GFlowNet"
        raise ValueError(f"{name} cannot keep big_layers {env.big_layers}: use {others}")
