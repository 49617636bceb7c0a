"""How routers are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from duorl.checks import require_positive


@dataclass(frozen=True)
class EvaluationOptions:
    """How routers are compared.

    Args:
        windows: windows of the evaluation split for losses in the routed context.
        reference_windows: windows of the evaluation split for regret and agreement in the reference context; their
            routes are searched.
        fixed_windows: windows of the router split on which fixed patterns are ranked.
        finalists: number of the best patterns that are measured again on `final_windows` windows of the router split.
        final_windows: see `finalists`; of each text, so many windows also decide which steps of a ladder are mixed.
        baseline: search of the best fixed pattern: `enumeration` of all, the dynamic `program`, or `greedy`. `auto`
            enumerates if this costs less than the training, and is greedy otherwise; the program costs as much as the
            greedy search and finds worse patterns.
        bound: the bound of routers: the `exhaustive` oracle, coordinate `descent` (a lower bound of the oracle), or
            `none`. `auto` is the first of these that costs less than the training. With `auto`, the number of windows
            may be lowered, so that the evaluation does not take longer than the training.
        batch: windows per pass.
    """

    windows: int = 256
    reference_windows: int = 16
    fixed_windows: int = 32
    finalists: int = 8
    final_windows: int = 128
    baseline: Literal["auto", "enumeration", "program", "greedy"] = "auto"
    bound: Literal["auto", "exhaustive", "descent", "none"] = "auto"
    batch: int = 16

    def __post_init__(self) -> None:
        counts = {name: value for name, value in vars(self).items() if name not in ("baseline", "bound")}
        require_positive(**counts)
        if self.reference_windows > self.windows:
            raise ValueError(f"reference_windows {self.reference_windows} must be among the {self.windows} windows")
