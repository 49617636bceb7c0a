"""Training to a budget: dual ascent changes the price until the router's compute meets a target."""

from __future__ import annotations

import math

from duorl.learners.base import Learner, Monitor, State
from duorl.routers import Router
from duorl.routers.calibration import Spending

_STEP = 2.0  # change of the logarithm of the price per unit of compute above the target
_ROUNDS = 10  # maximum of extra rounds; each is a tenth of the training, at least one update


class TargetCompute:
    """Dual ascent on the price (Altman 1999): max over routers, min over prices, of gain - price * (compute - target).

    During the training, the held-out compute of the greedy router is measured `checks` times. After each measurement,
    the logarithm of the price changes in proportion to compute - target. Then training continues in short rounds until
    the compute is within the tolerance.

    Args:
        learner: the reward of its task must have a price.
        target: mean compute, in (0, 1).
        spending: measures a router's held-out compute.
        price: price at the start.
        checks: number of measurements during the training.
        tolerance: largest difference to the target at the end.

    Attributes:
        price: current price, nats per all-big pass.
        compute: compute in the last measurement.

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
        """Whether the last measured compute is within the tolerance."""
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
        """The state of the learner and of the price; see `Learner.state`."""
        counters = {"price": self.price, "compute": self.compute, "total": self._total, "rounds": self._rounds}
        return {**counters, "learner": self.learner.state()}

    def restore(self, state: State) -> None:
        """See `Learner.restore`."""
        self.price, self.compute = state["price"], state["compute"]
        self._total, self._rounds = state["total"], state["rounds"]
        self.learner.restore(state["learner"])

    def _watch(self, monitor: Monitor | None) -> Monitor:
        """A monitor that changes the price at regular intervals, and adds it to the metrics."""
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
        """One step of dual ascent, on the logarithm of the price, so that the price stays above 0."""
        self.price *= math.exp(_STEP * (self.compute - self.target))
        self.learner.charge(self.price)


def check_target(target: float) -> float:
    """Check a target and return it.

    Raises:
        ValueError: it is not in (0, 1).
    """
    if not 0 < target < 1:
        raise ValueError(f"target_compute must be between 0 and 1, not {target}")
    return target
