"""The jobs of a run that trains: which there are, in which folders, and their running."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from duorl.cli.console import job_bars, quieten
from duorl.cli.workbench import Workbench
from duorl.corpus import Windows, source_names
from duorl.evaluation.budgets import Ladder
from duorl.files import writing
from duorl.routers import Router
from duorl.routers import load as load_router
from duorl.runs import interrupts
from duorl.runs.jobs import Executor, Job, Tell, run

_STEPS = 7  # of a ladder of prices


class JobsFailed(Exception):
    """Some jobs of a run are not finished.

    Args:
        left: their names.
        total: how many there are.
    """

    def __init__(self, left: list[str], total: int):
        super().__init__(f"{len(left)} of {total} jobs are not finished: {', '.join(left)}")


def finish_all(jobs: list[Job], place: Executor, folder: Path) -> None:
    """Run the jobs that are not finished.

    Raises:
        JobsFailed: not all could be finished.
        Interrupted: the process was told to end.
    """
    with job_bars(len(jobs), sum(job.finished for job in jobs)) as bars:
        left = run(jobs, place, folder, bars)
    if left:
        raise JobsFailed([job.name for job in left], len(jobs))


@dataclass(frozen=True)
class Place:
    """Where one training leaves what: which learner, with which seed, one of several or not, in which run's folder."""

    name: str
    seed: int
    run: Path
    several: bool = False

    @property
    def job(self) -> str:
        """The job's name."""
        return f"{self.name}, seed {self.seed}" if self.several else self.name

    @property
    def router(self) -> Path:
        """Folder of its router."""
        return self._own("routers")

    @property
    def events(self) -> Path:
        """Folder of its TensorBoard events."""
        return self._own("tensorboard")

    def _own(self, kind: str) -> Path:
        folder = self.run / kind / self.name
        return folder / f"seed-{self.seed}" if self.several else folder

    def load(self, bench: Workbench) -> Router:
        """The trained router."""
        return load_router(self.router).to(bench.model.device)


def train_apart(run: str, name: str, seed: int, place: str, events: str, tell: Tell) -> dict[str, Any]:
    """`Workbench.train` in a process of its own, on a workbench from the run's configuration."""
    return _bench(run).train(name, seed, place, events, tell)


def climb_apart(run: str, router: str, tell: Tell) -> dict[str, Any]:
    """`climb` in a process of its own."""
    return climb(_bench(run), router, tell)


def climb(bench: Workbench, router: str, tell: Tell) -> dict[str, Any]:
    """Measure a router at several prices on each text: the function of a job.

    Args:
        bench: the run's.
        router: its folder.
        tell: told of every text.
    """
    loaded, texts = load_router(router).to(bench.model.device), held_out_texts(bench)
    low, high = bench.prices or (0.0, 0.0)
    falling = (high * (low / high) ** (step / (_STEPS - 1)) for step in range(_STEPS))  # compute rises along them
    steps = [loaded.at(price=price) for price in falling]
    for done, (text, windows) in enumerate(texts.items()):
        tell(completed=done, total=len(texts), note=text)
        with writing(ladder_path(Path(router), text)) as beside:
            Ladder.climb(bench.model, steps, windows.tokens).save(beside)
        interrupts.check()
    return {}


def held_out_texts(bench: Workbench) -> dict[str, Windows]:
    """The first windows of every source's evaluation split, by the source's name."""
    count = bench.options.evaluation.windows
    texts = {name: bench.read_windows([name], split="evaluation") for name in source_names(bench.options.corpus)}
    return {name: Windows(text.tokens[:count], text.files[:count]) for name, text in texts.items()}


def ladder_path(router: Path, text: str) -> Path:
    """Where a router's ladder on a text lies."""
    return router / f"ladder-{text.replace('/', '_')}.safetensors"


@lru_cache(maxsize=1)
def _bench(run: str) -> Workbench:
    from duorl.cli.parser import parse

    quieten()
    torch.manual_seed(0)
    return Workbench(*parse("compare", ["--config", str(Path(run) / "config.yaml")]))
