"""Journal: TensorBoard events, the same tags for every agent over the same axis, layer decisions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter


class Journal:
    """Writes one learner's events.

    Args:
        folder: where; TensorBoard shows each folder as a run.
    """

    def __init__(self, folder: Path):
        self._writer = SummaryWriter(str(folder))

    def scalars(self, decisions: int, metrics: Mapping[str, float]) -> None:
        """Metrics by tag, after so many layer decisions."""
        for tag, value in metrics.items():
            self._writer.add_scalar(tag, value, decisions)

    def picture(self, decisions: int, tag: str, figure: Figure) -> None:
        """An image; the figure is closed."""
        self._writer.add_figure(tag, figure, decisions, close=True)

    def hparams(self, options: Mapping[str, str | float | bool], results: Mapping[str, float]) -> None:
        """Hyper-parameters and what they led to, for TensorBoard's table of runs."""
        self._writer.add_hparams(dict(options), dict(results), run_name=".")

    def close(self) -> None:
        """Flush to disk."""
        self._writer.close()
