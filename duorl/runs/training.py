"""The training of one learner: it writes curves, validates, saves every few minutes, and can be resumed."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from duorl import ranks
from duorl.learners.base import Monitor, State
from duorl.routers.base import Router
from duorl.runs import checkpoints, interrupts
from duorl.runs.jobs import CHECKPOINT, Tell
from duorl.runs.journal import Journal
from duorl.version import VERSION

_SHOWN = ("rollout/return", "train/loss", "train/price")


class Trainable(Protocol):
    """A `Learner`, or a `TargetCompute` with a learner."""

    @property
    def decisions(self) -> int: ...  # noqa: D102

    @property
    def planned(self) -> int: ...  # noqa: D102

    def span(self, total_decisions: int) -> int: ...  # noqa: D102

    def learn(self, total_decisions: int, monitor: Monitor | None = None) -> Router: ...  # noqa: D102

    def go_on(self, monitor: Monitor | None = None) -> Router: ...  # noqa: D102

    def state(self) -> State: ...  # noqa: D102

    def restore(self, state: State) -> None: ...  # noqa: D102


@dataclass(frozen=True)
class Training:
    """Folders and intervals of a training.

    Args:
        total: layer decisions to learn from.
        place: folder of the router; the checkpoint is in it until the job is finished.
        events: folder of the TensorBoard events.
        save_every: seconds between checkpoints; one is also saved at the end, and after SIGINT and SIGTERM.
        validate: measures metrics of a router by tag, on text that no training uses.
        validations: number of these measurements during the training.
    """

    total: int
    place: Path
    events: Path
    save_every: float
    validate: Callable[[Router], Mapping[str, float]]
    validations: int

    @property
    def checkpoint(self) -> Path:
        """The file from which a training continues."""
        return self.place / CHECKPOINT

    def run(self, learner: Trainable, finish: Callable[[Router, Journal], Router], tell: Tell) -> Router:
        """Train to the end, from the checkpoint if there is one.

        Args:
            learner: a new learner.
            finish: called with the trained router and the journal; returns the final router.
            tell: called after every update.

        Raises:
            Interrupted: the process got a signal to end, and the state is saved.
            ValueError: the checkpoint is broken, or belongs to another training.
        """
        going_on = self.checkpoint.is_file()
        if going_on:
            self._restore(learner)
        elif ranks.first():
            shutil.rmtree(self.events, ignore_errors=True)  # removes the curve of a stopped training
        journal = Journal(self.events, learner.decisions)
        try:
            monitor = self._monitor(learner, journal, tell)
            router = learner.go_on(monitor) if going_on else learner.learn(self.total, monitor)
            return finish(router, journal)
        finally:
            journal.close()

    def _restore(self, learner: Trainable) -> None:
        state = checkpoints.load(self.checkpoint)
        try:
            learner.restore(state["learner"])
        except Exception as error:  # missing parts and wrong shapes are found only in the learner's code
            said = f"{type(error).__name__}: {error}"
            origin = f"another training, or DuoRL {checkpoints.version(self.checkpoint) or 'before 0.3'}, not {VERSION}"
            raise ValueError(f"{self.checkpoint} is from {origin}: delete it to start anew ({said})") from error

    def _monitor(self, learner: Trainable, journal: Journal, tell: Tell) -> Monitor:
        every = max(1, learner.span(self.total) // max(1, self.validations))
        before, saved = learner.decisions, time.monotonic()

        def monitor(decisions: int, metrics: Mapping[str, float], router: Router) -> None:
            nonlocal before, saved
            journal.scalars(decisions, metrics)
            tell(completed=decisions, total=learner.planned, note=_note(metrics))
            if ranks.first() and (decisions // every > before // every or decisions >= learner.planned):
                journal.scalars(decisions, self.validate(router))
            before = decisions
            due = decisions >= learner.planned or time.monotonic() - saved >= self.save_every
            if interrupts.asked() or due:
                if ranks.first():
                    journal.flush()
                    checkpoints.save(self.checkpoint, {"learner": learner.state()})
                saved = time.monotonic()
                interrupts.check()

        return monitor


def _note(metrics: Mapping[str, Any]) -> str:
    return ", ".join(f"{tag.partition('/')[2]} {metrics[tag]:+.4f}" for tag in _SHOWN if tag in metrics)[:40]
