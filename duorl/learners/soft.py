"""The soft router of Duo-LLM (arXiv 2410.10846, stage 3): a mixture of networks that becomes a hard choice.

P = softmax(tau * h), where h are the head's logits and tau is an inverse temperature that rises during the training.
The output of a layer is the mixture of its networks' outputs. Loss = cross-entropy + alpha * (mean compute - budget)^2.
In the paper, the budget is the share of big. Here it is the compute: with small and big this is the same up to a
factor, and it is also defined with skip. With a price in place of the budget, one router can be trained for a range of
prices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from duorl import ranks
from duorl.checks import require_positive
from duorl.closeness import Target, minus_divergence
from duorl.costs import BIG
from duorl.learners.base import HeadLearner, Task
from duorl.learners.sharpness import Schedule, Sharpness
from duorl.models.footprint import Batch, require_room
from duorl.paths import RouterPath
from duorl.prices import draw_prices
from duorl.rewards import Reward, TeacherKL
from duorl.routed_pass import RoutedPass

if TYPE_CHECKING:
    from duorl.models import DuoForCausalLM
    from duorl.routers import HeadRouter


class Soft(HeadLearner):
    """Trains heads through the mixture of the networks. The paper does not state alpha, schedule or learning rate.

    Args:
        env: the task; its seed also starts the weights and draws the windows, `windows_per_batch` per update.
        budget: target of the mean compute, in [0, 1]; None: compute is charged at the price of the task.
        alpha: weight of the squared error of the compute, in nats.
        updates: number of updates that `learn` makes; None: the number follows from the decisions asked for.
        first_sharpness: inverse temperature at the start.
        last_sharpness: inverse temperature at the end.
        schedule: how the inverse temperature changes; `constant`: it is `last_sharpness` from the start.
        straight_through: every token takes its most probable action, as in deployment, and only the gradient is that
            of the mixture.
        target: `text` lowers the next-token loss; `teacher` the distance to all-big, KL(all-big || mixture), which the
            price then has as its unit.
        learning_rate: learning rate of Adam; it falls linearly to 0.
        width: hidden units of a head; 0 for the paper's linear map.
        init: folder of a saved router to start from.

    Raises:
        ValueError: a count is below 1, a sharpness is not above 0, the schedule is unknown, or there are both a budget
            and a range of prices, or the tokens of an update do not fit into memory; or the task has a reward other
            than that of the target, or a hard budget.
    """

    stateful = ("optimizer", "generator")
    honours = frozenset({"prices"})

    def __init__(
        self,
        env: Task,
        *,
        budget: float | None = None,
        alpha: float = 10.0,
        updates: int | None = 120,
        first_sharpness: float = 1.0,
        last_sharpness: float = 20.0,
        schedule: Schedule = "geometric",
        straight_through: bool = False,
        target: Target = "text",
        learning_rate: float = 1e-2,
        width: int = 0,
        init: RouterPath | None = None,
    ):
        self.target = target
        super().__init__(env, learning_rate=learning_rate, width=width, init=init)
        if updates is not None:
            require_positive(updates=updates)
        self.sharpness = Sharpness(first_sharpness, last_sharpness, schedule)
        if env.prices is not None and budget is not None:
            raise ValueError("give a budget or a range of prices, not both")
        batch = Batch(env.windows_per_batch, env.windows.shape[1] - 1, "everything")
        require_room(env.model, batch, f"lower windows_per_batch ({env.windows_per_batch})")
        self.budget, self.alpha, self.updates = budget, alpha, updates
        self.straight_through = straight_through
        self.generator = torch.Generator().manual_seed(env.first_seed)

    def follows(self, reward: Reward) -> bool:
        """The loss, or with the target `teacher` also the distance to all-big alone; see `Learner.follows`."""
        by_distance = self.target == "teacher" and isinstance(reward, TeacherKL) and reward.share == 1
        return by_distance or super().follows(reward)

    @property
    def decisions_per_update(self) -> int:
        """Layer decisions of the windows in an update."""
        windows = ranks.count() * self.env.windows_per_batch
        return self.env.layers * windows * (self.env.windows.shape[1] - 1)

    def span(self, total_decisions: int) -> int:
        """All updates."""
        return total_decisions if self.updates is None else self.updates * self.decisions_per_update

    def update(self) -> dict[str, float]:
        """One gradient step on windows drawn at random; returns its metrics by tag."""
        env = self.env
        drawn = torch.randint(len(env.windows), (ranks.count() * env.windows_per_batch,), generator=self.generator)
        picked = ranks.own(drawn)
        price: Tensor | float = env.charged
        if env.prices is not None:
            prices = draw_prices(env.prices, len(drawn), self.generator)
            price = ranks.own(prices)[:, None].to(env.model.device)
        tau = self.sharpness.at(self.progress)
        walk = soft_pass(
            env.model,
            self.router,
            env.windows[picked],
            tau,
            price if isinstance(price, Tensor) else None,
            straight_through=self.straight_through,
        )
        compute, by_text = walk.compute, self.target == "text"
        with torch.set_grad_enabled(by_text):
            losses = walk.losses()
        lowered = losses if by_text else distances(walk, env.model, env.windows[picked])
        self.descend(soft_loss(lowered, compute, price=price, budget=self.budget, alpha=self.alpha))
        gain = env.reference_losses(picked) - losses.detach()
        return {
            "rollout/return": (gain - price * compute.detach()).mean().item(),
            "rollout/gain": gain.mean().item(),
            "rollout/compute": compute.mean().item(),
            "rollout/loss": losses.mean().item(),
        }


def soft_loss(
    losses: Tensor, compute: Tensor, *, price: float | Tensor, budget: float | None = None, alpha: float = 10.0
) -> Tensor:
    """Cross-entropy plus alpha * (mean compute - budget)^2 (Duo-LLM, stage 3), or plus price * mean compute.

    Args:
        losses: nats per token.
        compute: compute of the mixture per token, same shape as `losses`.
        price: nats per all-big pass, a number, or broadcastable to `losses`; not used with a budget.
        budget: target of the mean compute.
        alpha: see `Soft`.
    """
    if budget is None:
        return losses.mean() + (price * compute).mean()
    return losses.mean() + alpha * (ranks.mean(compute.mean()) - budget) ** 2


def soft_pass(
    model: DuoForCausalLM,
    router: HeadRouter,
    tokens: Tensor,
    tau: float,
    price: Tensor | None = None,
    *,
    straight_through: bool = False,
) -> RoutedPass:
    """The finished pass of the mixture P = softmax(tau * h); its losses and compute, (B, T) each, are differentiable.

    Args:
        model: a frozen duo model.
        router: gives the logits h.
        tokens: (B, T+1).
        tau: inverse temperature.
        price: (B, 1), one per window, if it is an input of the router.
        straight_through: see `Soft`.
    """
    walk = RoutedPass(model, tokens, price=price)
    while not walk.done:
        shares = (tau * router.logits(walk.view)).softmax(-1)
        weights = hardened(shares) if straight_through else shares
        walk.mix(weights, router.codes.tolist(), hard=straight_through)
    return walk


def distances(walk: RoutedPass, model: DuoForCausalLM, tokens: Tensor) -> Tensor:
    """KL(all-big || a finished pass) of its tokens (B, T+1), (B, T) nats, differentiable."""
    with torch.no_grad():
        teacher = RoutedPass(model, tokens).take_all(BIG)
    return -walk.compare(teacher, minus_divergence)


def hardened(shares: Tensor) -> Tensor:
    """The most probable action, with the gradient of the shares (..., A): the straight-through estimator."""
    hard = one_hot(shares.argmax(-1), shares.shape[-1]).to(shares.dtype)
    return hard + shares - shares.detach()
