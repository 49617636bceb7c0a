"""`duorl label`: the labels of router text, searched once, in shards."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace

from duorl.checks import require_positive
from duorl.experiments.built import again
from duorl.experiments.material import Material
from duorl.experiments.trainings import Workers
from duorl.experiments.voice import say
from duorl.learners.shards import ABOUT, SHARDS, write_about, write_shard
from duorl.learners.sources import Source
from duorl.prices import check_price, check_prices, ladder
from duorl.runs import interrupts
from duorl.runs.jobs import Job, Tell

_RUNGS = 5  # prices of a range
_SHARD = Path(SHARDS).name.replace("*", "labels")


def prepare(options: Namespace, config: dict[str, Any]) -> tuple[str, Callable[[Path], None]]:
    """The default name of the folder, and what labels text in it.

    Raises:
        ValueError, OSError: the model, the text or the base policy cannot be used.
    """
    require_positive(window=options.window, windows=options.windows, shard=options.shard)
    check_price(options.price)
    if options.prices is not None:
        check_prices(options.prices)
    labelling = Labelling(options)
    workers = Workers("label", options, config, labelling.model, labelling.model.device, most=labelling.shards)
    return "labels", partial(_run, labelling, workers)


class Labelling:
    """What every shard needs.

    Args:
        options: `LabelOptions`.
    """

    def __init__(self, options: Namespace):
        self.options = options
        material = Material.of(options, options.window)
        self.model, self.windows = material.model, material.read(options.corpus, split="router").tokens
        self.source = Source(self.model, options.actions, options.base)
        if self.source.stored is not None:
            raise ValueError(f"base {options.base} has labels already: name a policy")
        self.prices = [options.price] if options.prices is None else ladder(options.prices, _RUNGS)

    @property
    def shards(self) -> int:
        """How many there are."""
        return -(-min(self.options.windows, len(self.windows)) // self.options.shard)

    def shard(self, number: int, place: Path, tell: Tell) -> dict[str, Any]:
        """Label the windows of a shard: the function of a job."""
        size = self.options.shard
        tokens = self.windows[number * size : (number + 1) * size].to(self.model.device)
        generator = torch.Generator().manual_seed(self.options.seed * 2**20 + number)
        with interrupts.immediate():
            found = self.source.table(tokens) or self.source.deviations(tokens, self.prices, generator)
        write_shard(place / _SHARD, tokens, found)
        return {"windows": len(tokens)}


def shard_apart(run: Path, number: int, place: Path, tell: Tell) -> dict[str, Any]:
    """Label the windows of a shard in another process."""
    return _labelling(run).shard(number, place, tell)


@lru_cache(maxsize=1)
def _labelling(run: Path) -> Labelling:
    return Labelling(again("label", run)[0])


def _run(labelling: Labelling, workers: Workers, folder: Path) -> None:
    options, available = labelling.options, len(labelling.windows)
    write_about(folder, labelling.model, options.actions, searched=labelling.source.searches)
    jobs = []
    for number in range(labelling.shards):
        place = folder / "shards" / f"{number:05}"
        job = Job(place.name, place, labelling.shard, {"number": number, "place": place})
        jobs.append(workers.placed(job, shard_apart, folder))
    workers.finish(jobs, folder)
    labelled = sum(job.result["windows"] for job in jobs)
    say(f"{labelled} of {available} windows of {options.window} tokens are labelled")
    say(f"wrote {folder}/: {ABOUT}, {SHARDS}")
