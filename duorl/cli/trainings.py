"""The jobs of a run with trainings: their names, their folders, and how they run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duorl.cli.console import job_bars, quieten
from duorl.cli.workbench import Workbench
from duorl.corpus import Windows, source_names
from duorl.evaluation.budgets import Ladder
from duorl.files import writing
from duorl.routers import Router
from duorl.routers import load as load_router
from duorl.runs import interrupts
from duorl.runs.jobs import Executor, Job, Tell, run

_STEPS = 7  # prices at which a router is measured
_BEYOND = 0.05  # of the compute


class JobsFailed(Exception):
    """Some jobs of a run are not finished.

    Args:
        left: names of these jobs.
        total: number of all jobs.
    """

    def __init__(self, left: list[str], total: int):
        super().__init__(f"{len(left)} of {total} jobs are not finished: {', '.join(left)}")


def finish_all(jobs: list[Job], place: Executor, folder: Path) -> None:
    """Run the jobs that are not finished.

    Raises:
        JobsFailed: some jobs are not finished.
        Interrupted: the process got a signal to stop.
    """
    with job_bars(len(jobs), sum(job.finished for job in jobs)) as bars:
        left = run(jobs, place, folder, bars)
    if left:
        raise JobsFailed([job.name for job in left], len(jobs))


@dataclass(frozen=True)
class Place:
    """The folders and the job name of one training: a learner with a seed in a run."""

    name: str
    seed: int
    run: Path
    several: bool = False

    @property
    def job(self) -> str:
        """Name of the job."""
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


def train_apart(run: str, tell: Tell, **arguments: Any) -> dict[str, Any]:
    """Run `Workbench.train` in another process, with a workbench from the run's configuration."""
    return _bench(run).train(tell=tell, **arguments)


def climb_apart(run: str, router: str, tell: Tell) -> dict[str, Any]:
    """Run `climb` in another process."""
    return climb(_bench(run), router, tell)


def climb(bench: Workbench, router: str, tell: Tell) -> dict[str, Any]:
    """Measure a router at several prices on each text: the function of a job.

    Args:
        bench: workbench of the run.
        router: folder of the router.
        tell: called after every text.
    """
    loaded, texts = load_router(router).to(bench.model.device), held_out_texts(bench)
    low, high = bench.prices or (0.0, 0.0)
    falling = (high * (low / high) ** (step / (_STEPS - 1)) for step in range(_STEPS))  # so compute rises
    steps = [loaded.at(price=price) for price in falling]
    if bench.options.reach_targets:
        steps += [_calibrated(bench, loaded, target, steps[-1]) for target in _around(bench.options.targets)]
    for done, (text, windows) in enumerate(texts.items()):
        tell(completed=done, total=len(texts), note=text)
        if (path := ladder_path(Path(router), text)).exists():  # measured before the run was stopped
            continue
        with writing(path) as beside:
            own = router_text(bench, text)
            Ladder.climb(bench.model, steps, windows.tokens, own, between=interrupts.check).save(beside)
    return {}


def _around(targets: Sequence[float]) -> list[float]:
    """Targets, and one beyond each end: on other text a router spends a little less or more."""
    beyond = [min(targets) - _BEYOND, max(targets) + _BEYOND]
    return [*targets, *(target for target in beyond if 0 < target < 1)]


def _calibrated(bench: Workbench, router: Router, target: float, otherwise: Router) -> Router:
    """The router calibrated on router text that no training uses; another one where it cannot spend so much."""
    interrupts.check()
    try:
        return router.calibrated(bench.model, bench.validation, compute=target)
    except ValueError:  # the table says what the router spends
        return otherwise


@lru_cache(maxsize=1)
def held_out_texts(bench: Workbench) -> dict[str, Windows]:
    """The first windows of the evaluation split of each text, by its name: texts that were learned on, then others."""
    options = bench.options
    names = [*source_names(options.corpus), *options.transfer]
    return {name: bench.read([name], split="evaluation").first(options.evaluation.windows) for name in names}


@lru_cache
def router_text(bench: Workbench, text: str) -> Tensor | None:
    """The first windows of a text's router split, to calibrate on; None without texts that were not learned on."""
    if not bench.options.transfer:
        return None
    return bench.read([text], split="router").tokens[: bench.options.evaluation.fixed_windows]


def ladder_path(router: Path, text: str) -> Path:
    """File of the measurements of a router at several prices on a text."""
    return router / f"ladder-{text.replace('/', '_')}.safetensors"


@lru_cache(maxsize=1)
def _bench(run: str) -> Workbench:
    from duorl.cli.parser import parse

    quieten()
    torch.manual_seed(0)
    return Workbench(*parse("compare", ["--config", str(Path(run) / "config.yaml")]))
