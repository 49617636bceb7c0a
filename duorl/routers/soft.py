"""The soft router of Duo-LLM (arXiv 2410.10846, stage 3): a mixture of the modules, hardened over training.

P = softmax(tau * h) with h the head's scores and tau a rising inverse temperature; a layer's output is the
mixture of its modules' outputs; loss = cross-entropy + alpha * (mean compute - budget)^2. The paper states the
budget as the share of big. Measured as compute it is the same for small / big up to a factor, and means
something with skip as well. With a price in place of the budget, one router may be trained for a range of prices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from duorl.checks import require_positive
from duorl.models.loading import require_frozen
from duorl.models.modeling import DuoForCausalLM
from duorl.routed_pass import RoutedPass
from duorl.routers.heads import HeadRouter, draw_prices

Schedule = Literal["geometric", "linear", "constant"]


@dataclass(frozen=True)
class SoftOptions:
    """How the soft router is trained. The paper does not give alpha, schedule or learning rate.

    Args:
        budget: mean compute to aim at, in [0, 1]; with none, compute is charged at the run's price instead.
        alpha: weight of the budget's squared error, in nats.
        updates: number of updates.
        windows_per_batch: windows per update.
        first_sharpness: inverse temperature at the start.
        last_sharpness: at the end.
        schedule: how it gets there; `constant` has the last from the start.
        straight_through: every token takes its likeliest action alone, as when deployed, and only the gradient is that
            of the mixture.
        learning_rate: of Adam; falls linearly to 0.
        width: hidden units of a head; 0 for the paper's linear map.
    """

    budget: float | None = None
    alpha: float = 10.0
    updates: int = 120
    windows_per_batch: int = 8
    first_sharpness: float = 1.0
    last_sharpness: float = 20.0
    schedule: Schedule = "geometric"
    straight_through: bool = False
    learning_rate: float = 1e-2
    width: int = 0

    def __post_init__(self) -> None:
        require_positive(updates=self.updates, windows_per_batch=self.windows_per_batch)
        if min(self.first_sharpness, self.last_sharpness) <= 0:
            raise ValueError("first_sharpness and last_sharpness must be above 0")
        if self.schedule not in get_args(Schedule):
            raise ValueError(f"unknown schedule {self.schedule!r}: choose from {', '.join(get_args(Schedule))}")


def sharpness(progress: float, first: float, last: float, schedule: Schedule = "geometric") -> float:
    """The inverse temperature at `progress` in [0, 1]."""
    if schedule == "constant":
        return last
    return first + (last - first) * progress if schedule == "linear" else first * (last / first) ** progress


def soft_loss(losses: Tensor, compute: Tensor, *, options: SoftOptions, price: float | Tensor) -> Tensor:
    """Cross-entropy plus alpha * (mean compute - budget)^2 (Duo-LLM, stage 3), or plus price * mean compute.

    Args:
        losses: nats per token.
        compute: mixture's compute per token, the shape of `losses`.
        options: with or without a budget.
        price: nats per all-big pass, one for all, or broadcastable to `losses`.
    """
    if options.budget is None:
        return losses.mean() + (price * compute).mean()
    return losses.mean() + options.alpha * (compute.mean() - options.budget) ** 2


def train_soft(
    model: DuoForCausalLM,
    windows: Tensor,
    *,
    price: float,
    prices: tuple[float, float] | None = None,
    actions: Sequence[str] = ("small", "big"),
    options: SoftOptions | None = None,
    seed: int = 0,
) -> HeadRouter:
    """Train the paper's learned router through the mixture, in the routed context.

    Args:
        model: a frozen duo model.
        windows: (W, T+1) router-training text.
        price: nats per all-big pass, charged where neither `options.budget` nor `prices` is given.
        prices: lowest and highest, for a router that takes the price as an input: every window draws its own, uniform
            on a log scale, and is charged it.
        actions: names of the allowed actions.
        options: see `SoftOptions`.
        seed: of the initial weights and the order of the windows.

    Raises:
        ValueError: the model has a trainable parameter, or both a budget and a range of prices are given.
    """
    require_frozen(model)
    options = options or SoftOptions()
    if prices is not None and options.budget is not None:
        raise ValueError("a budget leaves nothing to a range of prices: give one of the two")
    router = HeadRouter(model.num_layers, model.hidden_size, actions, options.width, seed, prices).to(model.device)
    optimizer = torch.optim.Adam(router.parameters(), lr=options.learning_rate)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, options.updates)
    generator = torch.Generator().manual_seed(seed)
    for update in range(options.updates):
        picked = torch.randint(len(windows), (options.windows_per_batch,), generator=generator)
        charged = router.prices and draw_prices(router.prices, len(picked), generator)[:, None].to(model.device)
        tau = sharpness(update / options.updates, options.first_sharpness, options.last_sharpness, options.schedule)
        losses, compute = soft_pass(
            model, router, windows[picked].to(model.device), tau, charged, straight_through=options.straight_through
        )
        loss = soft_loss(losses, compute, options=options, price=price if charged is None else charged)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        falling.step()
    return router.eval().requires_grad_(False)


def soft_pass(
    model: DuoForCausalLM,
    router: HeadRouter,
    tokens: Tensor,
    tau: float,
    price: Tensor | None = None,
    *,
    straight_through: bool = False,
) -> tuple[Tensor, Tensor]:
    """Losses in nats and compute, both (B, T) and differentiable, of the mixture P = softmax(tau * h).

    Args:
        model: a frozen duo model.
        router: its scores are h.
        tokens: (B, T+1).
        tau: inverse temperature.
        price: (B, 1), of every window, where the router takes it as an input.
        straight_through: see `SoftOptions`.
    """
    walk = RoutedPass(model, tokens)
    while not walk.done:
        shares = (tau * router.score(walk.hidden, walk.layer, walk.compute, price)).softmax(-1)
        walk.mix(hardened(shares) if straight_through else shares, router.codes.tolist())
    return walk.losses(), walk.compute


def hardened(shares: Tensor) -> Tensor:
    """The likeliest action alone, with the gradient of the shares (..., A): the straight-through estimator."""
    hard = one_hot(shares.argmax(-1), shares.shape[-1]).to(shares.dtype)
    return hard + shares - shares.detach()
