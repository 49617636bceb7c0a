"""GFlowNet: samples routes in proportion to exp(return / temperature), trained by sub-trajectory balance.

Amortized inference (Hu et al. 2023, arXiv 2310.04363) with the loss of Madan et al. 2022 (arXiv 2209.12782). A state is
a token's route so far. The states form a tree of depth L, so the backward policy is 1. The flow F(s) of a state is the
sum of exp(return / temperature) over the routes through it. The policy follows from the flow:
pi(a | s) = F(s a) / F(s).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from duorl.agents.advantages import entropy, explained_variance, rewards_to_go
from duorl.agents.base import Agent
from duorl.agents.rollouts import sample
from duorl.envs.lockstep import Lockstep
from duorl.paths import RouterPath


def subtrajectory_balance(log_flow: Tensor, log_chosen: Tensor, decay: float) -> Tensor:
    """Sub-trajectory balance (Madan et al. 2022, eq. 10 and 11 with P_B = 1), a scalar.

    Mean over tokens and over i < j, with weights decay^(j - i), of
    [log F(s_i) + log pi(a_i | s_i) + ... + log pi(a_{j-1} | s_{j-1}) - log F(s_j)]^2.

    Args:
        log_flow: (L+1, N), log F of the states of N routes; the last row is return / temperature.
        log_chosen: (L, N), log-probabilities of the chosen actions.
        decay: above 0. Near 0, only single decisions count. Above 1, whole routes have the largest weight.
    """
    # The sum of log pi from i to j is a difference of prefix sums. So is the whole bracket.
    excess = log_flow - torch.cat([torch.zeros_like(log_flow[:1]), log_chosen.cumsum(0)])
    start, end = torch.triu_indices(len(excess), len(excess), offset=1, device=excess.device)
    weights = decay ** (end - start).to(excess.dtype)
    return weights @ (excess[start] - excess[end]).square().mean(1) / weights.sum()


class GFlowNet(Agent):
    """Samples routes with P(route) ~ exp(return / temperature), by sub-trajectory balance on its own samples.

    In deployment, the router takes the most probable action in each layer. With a low temperature, this is the best
    route. With a high temperature, other good routes are also probable. The distribution is exact if a token's return
    depends only on its own route (context `reference`). In the routed context, the routes of other tokens add noise.

    log F(s_l) = (rewards before l + V(s_l)) / temperature + (L - l) log A. V is a learned head, in nats; it predicts
    the rewards after l. This is the forward-looking form of Pan et al. 2023 (arXiv 2302.01687): the rewards before l
    are known in s_l. If all rewards are 0, V = 0 is exact.

    Args:
        env: the environment; its seed also starts the weights and the sampled actions. It may have a hard budget.
        temperature: nats of return, above 0.
        decay: above 0; a sub-trajectory of n decisions has the weight decay^n.
        learning_rate: learning rate of Adam; it falls linearly to 0.
        width: hidden units of a head; 0 for linear heads.
        init: folder of a saved router to start from.

    Raises:
        ValueError: temperature or decay is not above 0.
    """

    stateful = ("values", "optimizer", "generator")
    honours = frozenset({"reward", "prices", "big_layers"})

    def __init__(
        self,
        env: Lockstep,
        *,
        temperature: float = 0.1,
        decay: float = 0.9,
        learning_rate: float = 1e-2,
        width: int = 0,
        init: RouterPath | None = None,
    ):
        if temperature <= 0 or decay <= 0:
            raise ValueError(f"temperature and decay must be above 0, not {temperature} and {decay}")
        super().__init__(env, learning_rate=learning_rate, width=width, init=init)
        self.temperature, self.decay = temperature, decay
        self.generator = torch.Generator(env.model.device).manual_seed(env.first_seed)
        self.values = self.critic_heads()

    def update(self) -> dict[str, float]:
        """One episode of all tokens and one gradient step; returns its metrics by tag.

        `train/explained_variance` compares the later rewards with their estimate from temperature * (log F + log pi of
        the later choices); both are equal in perfect balance.
        """
        episode = sample(self.env, self.router, self.generator, self.values)
        assert episode.values is not None
        log_flow = self._log_flow(episode.values, episode.outcome.credits)
        self.descend(subtrajectory_balance(log_flow, episode.log_chosen, self.decay))
        with torch.no_grad():
            balance = self.temperature * (log_flow[:-1] - log_flow[-1] + rewards_to_go(episode.log_chosen))
            returns = rewards_to_go(episode.outcome.credits)
            return {
                **episode.outcome.metrics(),
                "train/entropy": entropy(episode.logits).mean().item(),
                "train/explained_variance": explained_variance(returns + balance, returns),
            }

    def _log_flow(self, values: Tensor, rewards: Tensor) -> Tensor:
        """log F of the states of a route, (L+1, N), from V (L, N) and rewards (L, N)."""
        nothing = torch.zeros_like(rewards[:1])
        earned = torch.cat([nothing, rewards.cumsum(0)])  # (L+1, N), before each decision
        routes_left = math.log(len(self.env.codes)) * torch.arange(self.env.layers, -1, -1, device=rewards.device)
        return (earned + torch.cat([values, nothing])) / self.temperature + routes_left[:, None]
