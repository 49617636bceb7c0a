"""ReinMax: a policy gradient with advantages from the derivatives of the frozen model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from duorl import ranks
from duorl.agents.advantages import entropy, explained_variance, leave_one_out, rewards_to_go
from duorl.agents.base import Agent
from duorl.agents.rollouts import choose
from duorl.envs.lockstep import Lockstep
from duorl.learners.sharpness import Sharpness
from duorl.paths import RouterPath


class ReinMax(Agent):
    """Policy gradient through the differentiable model, on sampled routes.

    The model is frozen and differentiable. So one backward pass along a sampled route computes, for every layer and
    token, how another action would change the return to first order, with its effect on later tokens. ReinMax (Liu et
    al. 2023, Heun's method) weights these derivatives so that the estimate of an action's advantage is of second order:
    `action_effects`. The terms of higher order are its bias. Its variance is much smaller than that of REINFORCE.
    The rewards of later tokens count in full. If the environment has a `token_discount`, they are discounted by it:
    `discounted_slopes`.

    With `correction` 1, the estimate is a control variate, as in MuProp (Gu et al. 2016) and REBAR (Tucker et al.
    2017): REINFORCE on the part of the return that the derivatives of the other copies do not explain, plus the exact
    expectation of these derivatives. It has no bias, except for its scale, which is fitted to the batch. With values
    between 0 and 1, a larger value gives less bias and more variance.

    Args:
        env: the environment; its seed also starts the weights and the sampled actions.
        correction: share of REINFORCE in the gradient, 0 to 1; above 0, the environment needs a group_size of at least
            2.
        learning_rate: learning rate of Adam; it falls linearly to 0.
        least_share: lower bound of the probabilities in the weights of the derivatives; it bounds the weights. Effects
            of second order of choices that are less probable are underestimated.
        first_sharpness: inverse temperature at the start; a training that goes on from a router of `Soft` begins near
            the sharpness at which that one ended.
        last_sharpness: inverse temperature at the end; it rises geometrically, so that the sampled routes become
            similar to the greedy routes in deployment.
        width: hidden units of a head; 0 for linear heads.
        init: folder of a saved router to start from.

    Raises:
        ValueError: the correction is not in [0, 1], or above 0 without copies or with `later_effects`; or a sharpness
            is not above 0; or the tokens of an episode do not fit into memory.
    """

    stateful = ("optimizer", "generator")
    honours = frozenset({"reward", "prices", "big_layers"})

    def __init__(
        self,
        env: Lockstep,
        *,
        correction: float = 0.0,
        learning_rate: float = 1e-2,
        least_share: float = 0.1,
        first_sharpness: float = 1.0,
        last_sharpness: float = 8.0,
        width: int = 0,
        init: RouterPath | None = None,
    ):
        super().__init__(env, learning_rate=learning_rate, width=width, init=init)
        env.require_room("everything")
        if not 0 <= correction <= 1:
            raise ValueError(f"correction must be in [0, 1], not {correction}")
        if correction and env.group_size < 2:
            raise ValueError("a correction compares copies of a token: set group_size to at least 2")
        if correction and env.credit.later_effects:
            raise ValueError("a correction counts later tokens by derivatives: set later_effects to false")
        self.sharpness = Sharpness(first_sharpness, last_sharpness)
        self.correction, self.least_share = correction, least_share
        self.generator = torch.Generator(env.model.device).manual_seed(env.first_seed)

    def update(self) -> dict[str, float]:
        """One episode of all tokens and one gradient step; returns its metrics by tag."""
        logits, chosen, slopes = self._episode()
        shares = logits.softmax(-1)
        with torch.no_grad():
            effects = action_effects(slopes, chosen, shares, self.least_share)
            explained = rewards_to_go(explained_by(effects, chosen, shares))
        loss = -(effects * shares).sum((0, 2)).mean()
        if self.correction:
            loss = loss.lerp(self._unbiased(logits, chosen, effects), self.correction)
        self.descend(loss)
        outcome = self.env.outcome
        return {
            **outcome.metrics(),
            "train/entropy": entropy(logits.detach()).mean().item(),
            "train/explained_variance": explained_variance(explained, rewards_to_go(outcome.credits)),
        }

    def _unbiased(self, logits: Tensor, chosen: Tensor, effects: Tensor) -> Tensor:
        """REINFORCE on the returns that the other copies' derivatives do not explain, and their exact expectation."""
        size = self.env.group_size
        shares, returns = logits.softmax(-1), rewards_to_go(self.env.outcome.credits)
        with torch.no_grad():
            others = leave_one_out(effects.transpose(1, 2).flatten(0, 1), size)  # (L * A, N)
            others = others.unflatten(0, (len(effects), -1)).transpose(1, 2)
            known = rewards_to_go(explained_by(others, chosen, shares))
            advantages = returns - leave_one_out(returns, size)
            explained, squares = (ranks.mean(sums) for sums in ((advantages * known).sum(), known.square().sum()))
            scale = explained / squares  # by least squares
        log_chosen = logits.log_softmax(-1)[chosen.bool()].view_as(known)
        pathwise = (others * shares).sum((0, 2)).mean()
        return -scale * pathwise - (log_chosen * (advantages - scale * known)).sum(0).mean()

    def _episode(self) -> tuple[Tensor, Tensor, Tensor]:
        """Sample one route per token: logits, choices as zeros and ones, slopes d rewards / d choices; (L, N, A)."""
        env, logits, mixtures = self.env, [], []
        env.draw()
        inverse = self.sharpness.at(self.progress)
        while not env.done:
            features = env.features
            state = env.hidden.detach(), env.layer, env.compute.detach()
            outputs = self.router.heads(*state, None if features is None else features.detach())
            outputs = (inverse * outputs).masked_fill(~env.action_masks(), -torch.inf)
            choice = choose(outputs.detach().softmax(-1), self.generator, env.group_size)
            mixture = torch.zeros_like(outputs).scatter(1, choice, 1.0).requires_grad_()
            env.step(choice.squeeze(1), mixture)
            logits.append(outputs)
            mixtures.append(mixture)
        return torch.stack(logits), torch.stack(mixtures).detach(), self._slopes(mixtures)

    def _slopes(self, mixtures: list[Tensor]) -> Tensor:
        """What each choice changes, its own token's rewards and later ones', to first order: (L, N, A)."""
        env = self.env
        if (discount := env.credit.token_discount) and env.context == "routed":
            return discounted_slopes(env.rewards, mixtures, discount, env.length, env.model.dtype)
        return torch.stack(torch.autograd.grad(env.rewards.sum(), mixtures))


def discounted_slopes(
    rewards: Tensor, choices: Sequence[Tensor], discount: float, length: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Derivatives of what a token is credited with by its own choices: its rewards, and later ones by their distance.

    D_t = d / d choice_t of sum_{s >= t} discount^(s - t) * r_s. Each reward counts once: the derivative of a later one
    has come through attention, so that the credit which is added to rewards for learners without derivatives would
    count it again. A token does not change what earlier ones earn, so that one backward pass with weights
    discount^(s - a) gives discount^(t - a) * D_t for all tokens t >= a; before that underflows another one begins.

    Args:
        rewards: (L, N), windows of `length` tokens side by side.
        choices: per layer (N, A), by which the rewards can be differentiated.
        discount: per token of distance, in (0, 1).
        length: T.
        dtype: of the derivatives inside the model.

    Returns:
        Shape (L, N, A).
    """
    least = torch.finfo(dtype).tiny ** 0.25
    span = max(1, int(math.log(least) / math.log(discount)))
    position, earned = torch.arange(rewards.shape[1], device=rewards.device) % length, rewards.sum(0)
    slopes = torch.zeros(len(choices), *choices[0].shape, device=rewards.device)
    for start in range(0, length, span):
        distance = position - start
        weights = torch.where(distance < 0, 0.0, discount ** distance.clamp(min=0))
        found = torch.autograd.grad(earned @ weights, choices, retain_graph=start + span < length)
        inside = ((distance >= 0) & (distance < span))[:, None]
        slopes = torch.where(inside, torch.stack(found) / weights[:, None], slopes)
    return slopes


def action_effects(slopes: Tensor, chosen: Tensor, shares: Tensor, least_share: float) -> Tensor:
    """Estimate the effect of each action, up to a constant, from the derivatives at the chosen one: ReinMax.

    sum_a e_a grad pi_a estimates grad E[R]. R(a) - R(c) is replaced by the mean of the derivatives at a and c times the
    difference of the choices (the trapezoid rule, exact if R is quadratic in the choice). The derivative at a is known
    only if a is chosen, so it gets the weight 1 / pi, as in Liu et al. (2023), equation 7:
    e_a = D_a / 2 + [a = c] (D_c - sum_b pi_b D_b) / (2 pi_c), D the slopes at the choice c. This is the same, up to a
    constant, as e_a = (D_a - sum_b pi_b D_b) (1 + ([a = c] - pi_a) / (2 pi_a)): the derivatives, and a correction with
    mean 0. A lower bound on the last pi_a bounds the correction alone. So the estimate stays exact in expectation if R
    is linear in the choice, whatever the policy; if R is quadratic, it is exact where all pi_a are above the bound.

    Args:
        slopes: (..., A), d R / d choice at the chosen action.
        chosen: (..., A), zeros and a one.
        shares: (..., A), the policy.
        least_share: lower bound on pi_a in the weight.

    Returns:
        Shape (..., A).
    """
    surprise = slopes - (slopes * shares).sum(-1, keepdim=True)
    least = max(least_share, torch.finfo(shares.dtype).tiny)  # a masked action has the probability 0
    return surprise * (1 + (chosen - shares) / (2 * shares.clamp(min=least)))


def explained_by(effects: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
    """The part of a return that a choice explains: its effect minus the mean effect of the policy, (..., A) to (...).

    Its mean over the policy is 0 if the effects do not depend on the choice.
    """
    return (effects * (chosen - shares)).sum(-1)
