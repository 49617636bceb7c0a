"""Stage 1 as a job: it saves every few minutes and after a signal, and continues from the saved state."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from duorl import ranks
from duorl.models.pretrain import Pretraining
from duorl.models.recipe import PretrainOptions
from duorl.runs import interrupts
from duorl.runs.jobs import Tell

_SAVE_EVERY = 120.0


def pretrain(options: dict[str, Any], tell: Tell, **where: Any) -> dict[str, Any]:
    """Train, from the last checkpoint if there is one, and save the model: the function of a job.

    Args:
        options: values of `PretrainOptions`; paths in the run's folder as `Path`.
        tell: called after every step.
        where: `device` and `dtype` of `Pretraining`.

    Raises:
        Interrupted: the process got a signal to end, and a checkpoint is saved.
    """
    values: dict[str, Any] = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    return run(Pretraining(PretrainOptions(**values), resume=True, **where), tell, card=False)


def run(prepared: Pretraining, tell: Tell, *, card: bool = True) -> dict[str, Any]:
    """Train and save a model whose input is already read.

    Args:
        prepared: the training.
        tell: called after every step.
        card: also write a model card.
    """
    work = prepared.run if card else prepared.train
    work([Saving(tell)])
    return {}


class Saving(TrainerCallback):
    """Makes the Trainer of transformers save at regular intervals, and stop after a signal.

    Args:
        tell: called after every step.
        every: seconds between checkpoints.
    """

    def __init__(self, tell: Tell, every: float = _SAVE_EVERY):
        self._tell, self._every = tell, every
        self._saved = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Ask for a checkpoint at regular intervals and after a signal."""
        self._tell(completed=state.global_step, total=state.max_steps)
        if interrupts.asked() or ranks.any_of(time.monotonic() - self._saved >= self._every):
            control.should_save = True

    def on_save(self, args, state, control, **kwargs) -> None:
        """Stop, if a signal came: the checkpoint is complete."""
        self._saved = time.monotonic()
        interrupts.check()
