"""Calibration: a router is changed so that it spends a given compute on some text. No labels are needed.

    router = router.calibrated(model, windows, compute=0.5)

For a router for a range of prices, the price is found. Where no price meets the compute, and for routers without a
price, costs are added to the logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from duorl.costs import BIG
from duorl.inputs import View
from duorl.routed_pass import RoutedPass
from duorl.routers.base import LogitRouter, Router
from duorl.routers.wrapped import WrappedRouter

if TYPE_CHECKING:
    from duorl.models import DuoForCausalLM

Spending = Callable[[Router], float]
"""Measures the mean compute of a deployed router on text that no training uses."""

_TOLERANCE = 0.005  # of the compute, within which a price alone is good enough
_MET = 5e-4  # of the compute: nearer to a target is not searched for, since a pass over the text is a step
_MISSED = 0.02  # of the compute, beyond which a target is out of reach
_MOST = 4.0**8  # nats; logits that differ by more are taken for certain


class ShiftedRouter(WrappedRouter):
    """Adds a constant to the logit of each action of a router.

    Args:
        router: the router; or, when it is loaded from a file, its class's name and `config`.
        shifts: A numbers in nats, in the order of the router's action codes.

    Raises:
        ValueError: the router has no logits or another number of actions, or a shift is not finite.
    """

    def __init__(self, router: LogitRouter | dict[str, Any], shifts: Sequence[float]):
        super().__init__(router, shifts=[float(shift) for shift in shifts])
        if not all(map(math.isfinite, shifts)):
            raise ValueError(f"shifts must be finite numbers, not {list(shifts)}")
        if len(shifts) != len(self.codes):
            raise ValueError(f"a router with {len(self.codes)} actions needs so many shifts, not {len(shifts)}")

    def logits(self, view: View) -> Tensor:
        """The shifted logits, (..., A); see `LogitRouter.logits`."""
        found = self.router.logits(view)
        return found + torch.tensor(self.config["shifts"], dtype=found.dtype, device=found.device)


@torch.no_grad()
def spent(model: DuoForCausalLM, router: Router, windows: Tensor, *, batch: int = 16) -> float:
    """Mean compute of a router on windows (W, T+1) in the routed context, in [0, 1]. The head does not run."""
    router.require_fit(model)
    found = []
    for tokens in windows.to(model.device).split(batch):
        router.begin(model, tokens)
        walk = RoutedPass(model, tokens)
        walk.steer(router.decide)
        found.append(walk.compute.cpu())
    return torch.cat(found).mean().item()


def calibrated(router: Router, model: DuoForCausalLM, windows: Tensor, compute: float) -> Router:
    """See `Router.calibrated`."""
    if not 0 < compute < 1:
        raise ValueError(f"compute must be between 0 and 1, not {compute}")
    spending: Spending = partial(spent, model, windows=windows)
    if router.config.get("prices") is not None:
        router = router.at(price=_nearest_price(router, compute, spending))
        if abs(spending(router) - compute) <= _TOLERANCE:
            return router
    if not isinstance(router, LogitRouter) or "big_layers" in router.config:
        raise ValueError(f"{type(router).__name__} has neither a range of prices nor free logits: its compute is fixed")
    return _shifted(router, compute, spending, model.flops.ffns.mean(0) / model.flops.ffns[:, BIG].mean())


def price_for(router: Router, target: float, spending: Spending) -> float:
    """The price at which a router for a range of prices meets a target, by bisection on a log scale.

    Args:
        router: a router for a range of prices; its compute falls as the price rises.
        target: mean compute, in (0, 1).
        spending: measures a router's held-out compute.

    Raises:
        ValueError: the router is for one price, or no price in its range meets the target.
    """
    if router.config.get("prices") is None:
        raise ValueError("this router was trained for one price: train with env.prices for a range of them")
    low, high = router.config["prices"]
    price = _nearest_price(router, target, spending)
    if price in (low, high) and abs((found := spending(router.at(price=price))) - target) > 1e-6:
        end = "most" if price == low else "least"
        raise ValueError(
            f"target_compute {target:g} is out of reach: at prices {low:g} to {high:g} the router spends at {end} "
            f"{found:.2f}; widen env.prices or train for longer"
        )
    return price


def _nearest_price(router: Router, target: float, spending: Spending) -> float:
    """The price that meets a target, or the end of the range that comes nearest."""
    low, high = router.config["prices"]
    at = lambda price: spending(router.at(price=price))  # noqa: E731
    if at(low) <= target:
        return low
    if at(high) >= target:
        return high
    price, _ = _crossing(at, low, high, target, lambda a, b: math.sqrt(a * b))
    return price


def _shifted(router: LogitRouter, target: float, spending: Spending, costs: Tensor) -> ShiftedRouter:
    """The router with its actions' costs, times a constant that meets the target, subtracted from its logits.

    Args:
        router: the router.
        target: mean compute.
        spending: measures the compute of a router.
        costs: (3,), FLOPs of the actions, those of big are 1.
    """
    own = costs[router.codes.cpu()].tolist()
    charged = lambda charge: ShiftedRouter(router, [-charge * cost for cost in own])  # noqa: E731
    at = lambda charge: spending(charged(charge))  # noqa: E731
    reach, least, most = 1.0, at(1.0), at(-1.0)
    while not least <= target <= most:
        if reach == _MOST:
            raise ValueError(f"compute {target:g} is out of reach: the router spends {least:.2f} to {most:.2f}")
        reach *= 4
        least, most = at(reach), at(-reach)
    charge, found = _crossing(at, -reach, reach, target, lambda a, b: (a + b) / 2)
    if abs(found - target) > _MISSED:
        raise ValueError(
            f"compute {target:g} is out of reach: the nearest that the router spends is {found:.2f}, mix two of its "
            "budgets with MixedRouter"
        )
    return charged(charge)


def _crossing(
    falling: Callable[[float], float],
    low: float,
    high: float,
    target: float,
    middle: Callable[[float, float], float],
    steps: int = 12,
) -> tuple[float, float]:
    """Where a falling function comes nearest to a target between two numbers, by bisection: the place and its value."""
    tried = []
    for _ in range(steps):
        place = middle(low, high)
        found = falling(place)
        tried.append((abs(found - target), place, found))
        if abs(found - target) < _MET:
            break
        low, high = (place, high) if found > target else (low, place)
    _, place, found = min(tried)
    return place, found
