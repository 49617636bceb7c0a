"""The order in which windows of a text are drawn: shuffled again in each pass; it can be saved and restored."""

from __future__ import annotations

from typing import Any

import numpy as np


class WindowOrder:
    """Endless batches of window indices: a new permutation in each pass, without the rest that does not fill a batch.

    Args:
        count: number of windows.
        batch: windows per batch.
        generator: draws the permutations.

    Raises:
        ValueError: there are fewer windows than `batch`.
    """

    def __init__(self, count: int, batch: int, generator: np.random.Generator):
        if count < batch:
            raise ValueError(f"the text has {count} windows, a batch takes {batch}: lower windows_per_batch")
        self.count, self.batch, self.generator = count, batch, generator
        self._shuffle()

    def __next__(self) -> np.ndarray:
        """The next batch, (batch,) int64."""
        if self._start + self.batch > self.count:
            self._shuffle()
        drawn = self._order[self._start : self._start + self.batch]
        self._start += self.batch
        return drawn

    def _shuffle(self) -> None:
        self._before = self.generator.bit_generator.state
        self._order, self._start = self.generator.permutation(self.count), 0

    def state(self) -> dict[str, Any]:
        """The place in the text: the generator before its last permutation, and how much of it is used."""
        return {"generator": self._before, "start": self._start}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a place."""
        self.generator.bit_generator.state = state["generator"]
        self._shuffle()
        self._start = state["start"]
