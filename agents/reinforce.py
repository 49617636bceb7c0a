"""REINFORCE (Williams 1992) over layer decisions, with a choice of baselines."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from agents.advantages import entropy, explained_variance, leave_one_out, rewards_to_go
from agents.base import EpisodicAgent
from envs.lockstep import Lockstep

Baseline = Literal["none", "mean", "leave-one-out", "value"]


class REINFORCE(EpisodicAgent):
    """Policy gradient: E[sum_l grad log pi(a_l | s_l) * (G_l - b_l)], one update per episode of all tokens.

    Args:
        env: tokens in lockstep; its seed also starts the weights and the sampled actions.
        baseline: b_l: `none`; `mean` of the batch in that layer; `leave-one-out`, the mean of the same token's other
            copies (needs the environment's group_size of at least 2); `value`, a learned head per layer.
        learning_rate: of Adam; falls linearly to 0.
        entropy_bonus: weight of the policy's entropy, in nats of return per nat of entropy.
        width: hidden units of a head; 0 for linear heads.
        init: folder of a saved router to start from.

    Raises:
        ValueError: `leave-one-out` without copies.
    """

    def __init__(
        self,
        env: Lockstep,
        *,
        baseline: Baseline = "leave-one-out",
        learning_rate: float = 1e-2,
        entropy_bonus: float = 0.0,
        width: int = 0,
        init: str | None = None,
    ):
        super().__init__(env, width, init)
        if baseline == "leave-one-out" and env.group_size < 2:
            raise ValueError("baseline 'leave-one-out' compares copies of a token: set group_size to at least 2")
        self.baseline = baseline
        self.entropy_bonus = entropy_bonus
        self.learning_rate = learning_rate
        self.generator = torch.Generator(env.model.device).manual_seed(env.first_seed)
        self.critic = self.heads(1)
        self.optimizer = torch.optim.Adam([*self.router.parameters(), *self.critic.parameters()], lr=learning_rate)

    def update(self) -> dict[str, float]:
        """One episode of all tokens and one gradient step; returns its metrics by tag."""
        logits, log_chosen, values = self._episode()
        outcome = self.env.outcome
        returns = rewards_to_go(outcome.credits)  # (L, N)
        spread = entropy(logits).mean()
        advantages = returns - self._baseline(returns, values)
        loss = -(log_chosen * advantages).sum(0).mean() - self.entropy_bonus * spread
        if self.baseline == "value":
            loss = loss + mse_loss(values, returns)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        explained = explained_variance(self._baseline(returns, values), returns)
        return {
            **outcome.metrics(),
            "train/entropy": spread.item(),
            "train/explained_variance": explained,
        }

    def _episode(self) -> tuple[Tensor, Tensor, Tensor]:
        """Sample one route per token: logits (L, N, A), log-probabilities of the choices (L, N), values (L, N)."""
        env, logits, log_chosen, values = self.env, [], [], []
        env.draw()
        while not env.done:
            scores = self.router.logits(env.hidden, env.layer, env.compute, env.conditions)
            scores = scores.masked_fill(~env.action_masks(), -torch.inf)
            log_shares = torch.log_softmax(scores, dim=-1)
            choice = torch.multinomial(log_shares.detach().exp(), 1, generator=self.generator)
            logits.append(scores)
            log_chosen.append(log_shares.gather(1, choice).squeeze(1))
            if self.baseline == "value":
                values.append(self.critic(env.hidden, env.layer, env.compute, env.conditions).squeeze(1))
            env.step(choice.squeeze(1))
        return torch.stack(logits), torch.stack(log_chosen), torch.stack(values or [torch.zeros(1)])

    def _baseline(self, returns: Tensor, values: Tensor) -> Tensor:
        if self.baseline == "mean":
            return returns.mean(1, keepdim=True).expand_as(returns)
        if self.baseline == "leave-one-out":
            return leave_one_out(returns, self.env.group_size)
        if self.baseline == "value":
            return values.detach()
        return torch.zeros_like(returns)
