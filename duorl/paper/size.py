"""The size of the study: numbers of windows, patterns and trainings."""

from __future__ import annotations

from dataclasses import dataclass

from duorl.checks import require_positive


@dataclass(frozen=True)
class StudySize:
    """The size of the study.

    Args:
        windows: number of windows of each text's evaluation split that are searched exhaustively.
        pattern_windows: number of windows of the router split on which fixed patterns are ranked.
        final_windows: number of windows of the router split on which the best patterns are measured again.
        random_patterns: number of random patterns in Fig. 4a (the paper: 100).
        big: numbers of big layers for which the soft router is trained, beside the paper's three; by default all.
        prices: prices for the training of DuoRL's agents, nats per all-big pass.
    """

    windows: int = 32
    pattern_windows: int = 32
    final_windows: int = 128
    random_patterns: int = 100
    big: tuple[int, ...] | None = None
    prices: tuple[float, ...] = (0.1, 0.3, 0.6)

    def __post_init__(self) -> None:
        if self.windows < 2:
            raise ValueError(f"windows must be at least 2, for intervals over them, not {self.windows}")
        if not self.prices or min(self.prices) < 0:
            raise ValueError(f"prices must be at least one, each at least 0, not {list(self.prices)}")
        if self.big is not None and any(count < 1 for count in self.big):
            raise ValueError(f"big must be numbers of layers from 1 on, not {list(self.big)}")
        counts = ("windows", "pattern_windows", "final_windows", "random_patterns")
        require_positive(**{name: getattr(self, name) for name in counts})
