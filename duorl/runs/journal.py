"""Journal: TensorBoard events, the same tags for every learner over the same axis, layer decisions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Journal:
    """Writes one learner's events.

    A training that goes on writes a further file, which tells readers to forget what an earlier one holds beyond the
    checkpoint; the curve is then that of a training that was never stopped.

    Args:
        folder: where; TensorBoard shows each folder as a run.
        decisions: layer decisions of the checkpoint from which the training goes on; 0 for a new one.
    """

    def __init__(self, folder: Path, decisions: int = 0):
        from torch.utils.tensorboard import SummaryWriter  # here, for it loads slowly

        self._writer = SummaryWriter(str(folder), purge_step=decisions + 1 if decisions else None)

    def scalars(self, decisions: int, metrics: Mapping[str, float]) -> None:
        """Metrics by tag, after so many layer decisions."""
        for tag, value in metrics.items():
            self._writer.add_scalar(tag, value, decisions)

    def picture(self, decisions: int, tag: str, figure: Figure) -> None:
        """An image; the figure is closed."""
        self._writer.add_figure(tag, figure, decisions, close=True)

    def hparams(self, decisions: int, options: Mapping[str, str | float | bool], results: Mapping[str, float]) -> None:
        """Hyper-parameters, for TensorBoard's table of runs, beside the results' last values."""
        from torch.utils.tensorboard.summary import hparams

        # The writer's own add_hparams would open a second file, and its points could not be taken back.
        for summary in hparams(dict(options), dict(results)):
            self._writer._get_file_writer().add_summary(summary, decisions)

    def flush(self) -> None:
        """Hand all that was told to the system: it then outlives this process."""
        self._writer.flush()

    def close(self) -> None:
        """Flush, and end."""
        self._writer.close()
