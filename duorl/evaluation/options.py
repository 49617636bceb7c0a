"""How routers are compared."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Literal

from duorl.checks import require_positive

DEEP = 12
"""Models with more layers are measured on fewer windows: a pass costs more, and there are far more patterns to try."""
_COUNTS = ("windows", "reference_windows", "fixed_windows", "finalists", "final_windows")
_SIZES = {
    ("full", False): (256, 16, 32, 8, 128),
    ("full", True): (32, 4, 16, 4, 32),
    ("quick", False): (64, 4, 8, 2, 16),
    ("quick", True): (8, 2, 8, 2, 8),
}
"""By effort, and by whether the model is deep."""


@dataclass(frozen=True)
class EvaluationOptions:
    """How routers are compared.

    The numbers depend on the model and on the effort, and never on the training: all runs on a text have one rival.

    Args:
        windows: windows of the evaluation split for losses in the routed context. By default 256; 32 for models of more
            than 12 layers.
        reference_windows: windows of the evaluation split for regret and agreement in the reference context; their
            routes are searched. By default 16; 4.
        fixed_windows: windows of the router split on which fixed patterns are ranked. By default 32; 16.
        finalists: number of the best patterns that are measured again on `final_windows` windows of the router split.
            By default 8; 4.
        final_windows: see `finalists`; of each text, so many windows also decide which steps of a ladder are mixed. By
            default 128; 32.
        effort: `full`, or `quick` for a look; `--quick` is this. With `quick` the defaults are 64, 4, 8, 2 and 16
            windows; for models of more than 12 layers 8, 2, 8, 2 and 8.
        baseline: search of the best fixed pattern: `enumeration` of all, the dynamic `program`, or `greedy`. `auto`
            enumerates up to 4,096 patterns, and is greedy otherwise; the program costs as much as the greedy search and
            finds worse patterns.
        bound: the bound of routers: the `exhaustive` oracle, coordinate `descent` (a lower bound of the oracle), or
            `none`. `auto` is exhaustive up to 4,096 routes, and a descent otherwise.
        batch: windows per pass.
    """

    windows: int | None = None
    reference_windows: int | None = None
    fixed_windows: int | None = None
    finalists: int | None = None
    final_windows: int | None = None
    effort: Literal["full", "quick"] = "full"
    baseline: Literal["auto", "enumeration", "program", "greedy"] = "auto"
    bound: Literal["auto", "exhaustive", "descent", "none"] = "auto"
    batch: int = 16

    def __post_init__(self) -> None:
        counts = {name: getattr(self, name) for name in (*_COUNTS, "batch")}
        require_positive(**{name: count for name, count in counts.items() if count is not None})
        if self.windows is not None and self.reference_windows is not None and self.reference_windows > self.windows:
            raise ValueError(f"reference_windows {self.reference_windows} must be among the {self.windows} windows")

    def sized(self, layers: int) -> SizedOptions:
        """The options for a model of so many layers: what is not given has its default.

        Raises:
            ValueError: there are more reference windows than windows.
        """
        defaults = dict(zip(_COUNTS, _SIZES[self.effort, layers > DEEP], strict=True))
        given = {name: value for name, value in asdict(self).items() if value is not None}
        if self.windows is not None and self.reference_windows is None:
            defaults["reference_windows"] = min(defaults["reference_windows"], self.windows)
        return SizedOptions(**{**defaults, **given})


@dataclass(frozen=True)
class SizedOptions(EvaluationOptions):
    """Options in which every number is known."""

    windows: int
    reference_windows: int
    fixed_windows: int
    finalists: int
    final_windows: int

    def within(self, training: int, held_out: int) -> SizedOptions:
        """With no more windows than there are, of the router split and of the evaluation split."""
        most = {
            "fixed_windows": training,
            "final_windows": training,
            "windows": held_out,
            "reference_windows": held_out,
        }
        return replace(self, **{name: min(getattr(self, name), count) for name, count in most.items()})
