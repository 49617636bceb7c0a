"""What routers a study needs: they are trained before it, side by side."""

from __future__ import annotations

from typing import NamedTuple


class Wanted(NamedTuple):
    """A router that a study needs; a study has no training of its own.

    Attributes:
        learner: name of the learner; None for the paper's soft router.
        at: the price of its training in nats per all-big pass; for the soft router the mean compute.
        actions: names of the allowed actions.
    """

    learner: str | None
    at: float
    actions: tuple[str, ...] = ("small", "big")

    def __str__(self) -> str:
        if self.learner is None:
            return f"soft at {self.at:.3f} of {' '.join(self.actions)}"
        return f"{self.learner} at price {self.at:g}"
