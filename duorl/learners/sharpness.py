"""The inverse temperature of a policy, which rises during a training: routes become similar to those in deployment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Schedule = Literal["geometric", "linear", "constant"]


@dataclass(frozen=True)
class Sharpness:
    """A schedule of the inverse temperature.

    Args:
        first: at the start.
        last: at the end.
        schedule: how it changes; `constant`: it is `last` from the start.

    Raises:
        ValueError: a sharpness is not above 0, or the schedule is unknown.
    """

    first: float
    last: float
    schedule: Schedule = "geometric"

    def __post_init__(self) -> None:
        if not min(self.first, self.last) > 0:
            raise ValueError("first_sharpness and last_sharpness must be above 0")
        if self.schedule not in get_args(Schedule):
            raise ValueError(f"unknown schedule {self.schedule!r}: choose from {', '.join(get_args(Schedule))}")

    def at(self, progress: float) -> float:
        """The inverse temperature at `progress` in [0, 1]."""
        if self.schedule == "constant":
            return self.last
        if self.schedule == "linear":
            return self.first + (self.last - self.first) * progress
        return self.first * (self.last / self.first) ** progress
