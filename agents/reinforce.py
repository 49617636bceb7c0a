"""REINFORCE (Williams 1992) over layer decisions, with a choice of baselines."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from duorl import ranks
from duorl.agents.advantages import entropy, explained_variance, leave_one_out, rewards_to_go
from duorl.agents.base import Agent
from duorl.agents.rollouts import sample
from duorl.envs.lockstep import Lockstep
from duorl.paths import RouterPath

Baseline = Literal["none", "mean", "leave-one-out", "value"]


class REINFORCE(Agent):
    """Policy gradient: E[sum_l grad log pi(a_l | s_l) * (G_l - b_l)], one update per episode of all tokens.

    Args:
        env: the environment; its seed also starts the weights and the sampled actions.
        baseline: b_l. `none`: 0; `mean`: the mean of the batch in that layer; `leave-one-out`: the mean of the token's
            other copies (needs a group_size of at least 2 in the environment); `value`: a learned head per layer.
        learning_rate: learning rate of Adam; it falls linearly to 0.
        entropy_bonus: weight of the policy's entropy, in nats of return per nat of entropy.
        width: hidden units of a head; 0 for linear heads.
        init: folder of a saved router to start from.

    Raises:
        ValueError: `leave-one-out` without other copies of a token.
    """

    stateful = ("critic", "optimizer", "generator")
    honours = frozenset({"reward", "prices", "big_layers"})

    def __init__(
        self,
        env: Lockstep,
        *,
        baseline: Baseline = "leave-one-out",
        learning_rate: float = 1e-2,
        entropy_bonus: float = 0.0,
        width: int = 0,
        init: RouterPath | None = None,
    ):
        super().__init__(env, learning_rate=learning_rate, width=width, init=init)
        if baseline == "leave-one-out" and env.group_size < 2:
            raise ValueError("baseline 'leave-one-out' compares copies of a token: set group_size to at least 2")
        self.baseline = baseline
        self.entropy_bonus = entropy_bonus
        self.generator = torch.Generator(env.model.device).manual_seed(env.first_seed)
        self.critic = self.critic_heads()

    def update(self) -> dict[str, float]:
        """One episode of all tokens and one gradient step; returns its metrics by tag."""
        learned = self.baseline == "value"
        episode = sample(self.env, self.router, self.generator, self.critic if learned else None)
        returns = rewards_to_go(episode.outcome.credits)  # (L, N)
        baseline = self._baseline(returns, episode.values)
        spread = entropy(episode.logits).mean()
        loss = -(episode.log_chosen * (returns - baseline)).sum(0).mean() - self.entropy_bonus * spread
        if episode.values is not None:
            loss = loss + mse_loss(episode.values, returns)
        self.descend(loss)
        return {
            **episode.outcome.metrics(),
            "train/entropy": spread.item(),
            "train/explained_variance": explained_variance(baseline, returns),
        }

    def _baseline(self, returns: Tensor, values: Tensor | None) -> Tensor:
        if self.baseline == "mean":
            return ranks.mean(returns.mean(1, keepdim=True)).expand_as(returns)
        if self.baseline == "leave-one-out":
            return leave_one_out(returns, self.env.group_size)
        return torch.zeros_like(returns) if values is None else values.detach()


ReinforceAgent = REINFORCE
