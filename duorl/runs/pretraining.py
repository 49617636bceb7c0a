"""Stage 1 as a job: it saves every few minutes and when it is told to end, and goes on from what it saved."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback

from duorl.models.pretrain import Pretraining
from duorl.models.recipe import PretrainOptions
from duorl.runs import interrupts
from duorl.runs.jobs import Tell

_SAVE_EVERY = 120.0


def pretrain(options: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """Train, from the last checkpoint where there is one, and save the model; the function of a job.

    Args:
        options: of `PretrainOptions`.
        tell: told of every step.

    Raises:
        Interrupted: the process was told to end, and a checkpoint is saved.
    """
    return run(Pretraining(PretrainOptions(**options), resume=True), tell, card=False)


def run(prepared: Pretraining, tell: Tell, *, card: bool = True) -> dict[str, Any]:
    """The same for a training whose input has been read already.

    Args:
        prepared: the training.
        tell: told of every step.
        card: a model card is written, too.
    """
    work = prepared.run if card else prepared.train
    work([Saving(tell, _SAVE_EVERY)])
    return {}


class Saving(TrainerCallback):
    """Has transformers' Trainer save in time, and stop once it has.

    Args:
        tell: told of every step.
        every: seconds between checkpoints.
    """

    def __init__(self, tell: Tell, every: float):
        self._tell, self._every = tell, every
        self._saved = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Ask for a checkpoint when it is time."""
        self._tell(completed=state.global_step, total=state.max_steps)
        if interrupts.pending() or time.monotonic() - self._saved >= self._every:
            control.should_save = True

    def on_save(self, args, state, control, **kwargs) -> None:
        """The checkpoint is whole."""
        self._saved = time.monotonic()
        interrupts.check()
