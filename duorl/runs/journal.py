"""Journal: writes TensorBoard events, with the same tags and the same x axis (layer decisions) for every learner."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duorl import ranks

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Journal:
    """Writes the events of one learner; on ranks other than the first, it writes nothing.

    A training that continues writes another file. It tells readers to ignore the points of the earlier file after the
    checkpoint. So the curve is that of a training that was never stopped.

    TensorBoard writes in a thread. What goes wrong there, such as a full disk, is raised by the next `scalars`,
    `flush` or `close`. Until `close`, the thread prints no traceback of its own.

    Args:
        folder: folder of the events; TensorBoard shows each folder as a run.
        decisions: layer decisions at the checkpoint from which the training continues; 0 for a new training.
    """

    def __init__(self, folder: Path, decisions: int = 0):
        from torch.utils.tensorboard import SummaryWriter  # imported here, because it loads slowly

        purge_step = decisions + 1 if decisions else None
        self._hook = threading.excepthook
        threading.excepthook = self._caught
        try:
            self._writer: Any = SummaryWriter(str(folder), purge_step=purge_step) if ranks.first() else _Nothing()
        except BaseException:  # it writes already
            threading.excepthook = self._hook
            raise

    def _caught(self, what: threading.ExceptHookArgs) -> None:
        if not type(what.thread).__module__.startswith("tensorboard."):
            self._hook(what)

    def scalars(self, decisions: int, metrics: Mapping[str, float]) -> None:
        """Write metrics by tag, after a number of layer decisions."""
        for tag, value in metrics.items():
            self._writer.add_scalar(tag, value, decisions)

    def picture(self, decisions: int, tag: str, figure: Figure) -> None:
        """Write an image; the figure is closed."""
        self._writer.add_figure(tag, figure, decisions, close=True)

    def hparams(self, decisions: int, options: Mapping[str, str | float | bool], results: Mapping[str, float]) -> None:
        """Write hyper-parameters and final results, for TensorBoard's table of runs."""
        from torch.utils.tensorboard.summary import hparams

        # The writer's add_hparams opens a second file, whose points cannot be removed on resume.
        for summary in hparams(dict(options), dict(results)):
            self._writer._get_file_writer().add_summary(summary, decisions)

    def flush(self) -> None:
        """Write everything to the operating system, so that a kill does not lose it.

        Raises:
            OSError: something could not be written.
        """
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the files."""
        try:
            self._writer.close()
        finally:
            threading.excepthook = self._hook


class _Nothing:
    """Takes every call and does nothing."""

    def __getattr__(self, name: str) -> _Nothing:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> _Nothing:
        return self
