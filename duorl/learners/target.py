"""Training to a budget: the price of compute by dual ascent, until the router spends what it shall."""

from __future__ import annotations

import math
from collections.abc import Callable

from duorl.learners.base import Learner, Monitor, State
from duorl.routers import Router

Spending = Callable[[Router], float]
"""Mean compute of a deployed router on text that nobody trains on."""

_STEP = 2.0  # of the logarithm of the price per unit of compute too much
_ROUNDS = 10  # extra ones at most, each a tenth of the training, an update at least


class TargetCompute:
    """Dual ascent on the price (Altman 1999): max over routers, min over prices, of gain - price * (compute - target).

    While the learner learns, the held-out compute of its greedy router is measured `checks` times, and the logarithm
    of the price moves with what is spent too much. After that training goes on in short rounds until the compute is
    within the tolerance.

    Args:
        learner: its task's reward must have a price.
        target: mean compute to spend, in (0, 1).
        spending: measures a router's held-out compute.
        price: to start from.
        checks: measurements during training.
        tolerance: of the compute at the end.

    Attributes:
        price: the price so far, nats per all-big pass.
        compute: what the router spent when it was last measured.

    Raises:
        ValueError: the target is not in (0, 1), or the reward has no price.
    """

    def __init__(
        self,
        learner: Learner,
        target: float,
        spending: Spending,
        *,
        price: float,
        checks: int = 40,
        tolerance: float = 0.01,
    ):
        self.learner, self.target, self.spending = learner, check_target(target), spending
        self.price, self.checks, self.tolerance = price, checks, tolerance
        self.compute = math.nan
        self._total = self._rounds = 0
        learner.charge(price)

    @property
    def met(self) -> bool:
        """The last measured compute is within the tolerance."""
        return abs(self.compute - self.target) <= self.tolerance

    @property
    def decisions(self) -> int:
        """See `Learner`."""
        return self.learner.decisions

    @property
    def planned(self) -> int:
        """See `Learner`; extra rounds add to it."""
        return self.learner.planned

    def span(self, total_decisions: int) -> int:
        """See `Learner.span`; without extra rounds."""
        return self.learner.span(total_decisions)

    def learn(self, total_decisions: int, monitor: Monitor | None = None) -> Router:
        """Train; see `Learner.learn`. The price is in the metrics, as `train/price`."""
        self._total, self._rounds = self.learner.span(total_decisions), 0
        self.learner.planned += self._total
        return self.go_on(monitor)

    def go_on(self, monitor: Monitor | None = None) -> Router:
        """Train until the target is met or the rounds are used up; see `Learner.go_on`."""
        while True:
            router = self.learner.go_on(self._watch(monitor))
            self.compute = self.spending(router)
            if self.met or self._rounds == _ROUNDS:
                return router
            self._move()
            self._rounds += 1
            self.learner.planned += max(self.learner.decisions_per_update, self._total // _ROUNDS)

    def state(self) -> State:
        """The learner's state, and the price's; see `Learner.state`."""
        counters = {"price": self.price, "compute": self.compute, "total": self._total, "rounds": self._rounds}
        return {**counters, "learner": self.learner.state()}

    def restore(self, state: State) -> None:
        """See `Learner.restore`."""
        self.price, self.compute = state["price"], state["compute"]
        self._total, self._rounds = state["total"], state["rounds"]
        self.learner.restore(state["learner"])

    def _watch(self, monitor: Monitor | None) -> Monitor:
        """Moves the price after every so many decisions, and tells the monitor of it."""
        every, size = self._total / self.checks, self.learner.decisions_per_update

        def watch(decisions: int, metrics: dict[str, float], router: Router) -> None:
            # After the last update the compute is measured anyway.
            if decisions // every > (decisions - size) // every and decisions < self.learner.planned:
                self.compute = self.spending(router)
                self._move()
            if monitor:
                monitor(decisions, {**metrics, "train/price": self.price}, router)

        return watch

    def _move(self) -> None:
        """One step of dual ascent; in the logarithm, so that the price stays above 0."""
        self.price *= math.exp(_STEP * (self.compute - self.target))
        self.learner.charge(self.price)


def check_target(target: float) -> float:
    """The target itself.

    Raises:
        ValueError: it is not in (0, 1).
    """
    if not 0 < target < 1:
        raise ValueError(f"target_compute must be between 0 and 1, not {target}")
    return target


def price_for(router: Router, target: float, spending: Spending, *, steps: int = 12) -> float:
    """The price at which a router for a range of prices spends what it shall, by bisection on a log scale.

    Args:
        router: spends less at higher prices.
        target: mean compute.
        spending: measures a router's held-out compute.
        steps: halvings of the range.

    Raises:
        ValueError: the router is for one price, or cannot spend that much or that little at its prices.
    """
    if router.config.get("prices") is None:
        raise ValueError("this router was trained for one price: train with env.prices for a range of them")
    low, high = router.config["prices"]
    most, least = spending(router.at(price=low)), spending(router.at(price=high))
    if not least <= target <= most:
        raise ValueError(
            f"target_compute {target:g} is out of reach: at prices {high:g} to {low:g} the router spends "
            f"{least:.2f} to {most:.2f}; widen env.prices or train for longer"
        )
    for _ in range(steps):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if spending(router.at(price=middle)) > target else (low, middle)
    return math.sqrt(low * high)
