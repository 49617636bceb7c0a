"""The jobs of a run with trainings: their names, their folders, and how they run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from jsonargparse import Namespace

from duorl.checks import require_positive
from duorl.corpus import Windows, source_names
from duorl.devices import processes_for
from duorl.evaluation.baseline import Baseline
from duorl.evaluation.choice import choose, flops_per_second
from duorl.evaluation.frontier import Ladder
from duorl.experiments.built import again
from duorl.experiments.reading import files_read
from duorl.experiments.voice import job_bars
from duorl.experiments.workbench import Workbench
from duorl.files import writing
from duorl.models import DuoConfig, DuoForCausalLM
from duorl.models.footprint import weight_bytes
from duorl.routers import PatternRouter, Router
from duorl.routers import load as load_router
from duorl.runs import interrupts
from duorl.runs.cluster import Needs, OnCluster, connect
from duorl.runs.jobs import RESULT, Executor, Function, Job, Tell, executor, run

_STEPS = 7  # prices at which a router is measured
_BEYOND = 0.05  # of the compute
_PROCESS = 2**30  # bytes of a job's process, beside the weights


class JobsFailed(Exception):
    """Some jobs of a run are not finished.

    Args:
        left: names of these jobs.
        total: number of all jobs.
    """

    def __init__(self, left: list[str], total: int):
        super().__init__(f"{len(left)} of {total} jobs are not finished: {', '.join(left)}")


class Workers:
    """Who does the jobs of a run: the machines of a cluster, or processes of this one.

    Args:
        command: name of the command.
        options: of the command; `processes`, `cluster` and `threads` are used.
        config: the options as plain values; machines of a cluster get the files that they name.
        model: the model that every job loads.
        device: where it will be.
        most: maximum number of jobs at the same time.

    Attributes:
        apart: whether jobs run in other processes, which read the run's configuration again.

    Raises:
        ValueError: `processes` is below 1, or the cluster is not there, or cannot do the jobs.
    """

    def __init__(
        self,
        command: str,
        options: Namespace,
        config: Mapping[str, Any],
        model: DuoForCausalLM,
        device: torch.device,
        most: int | None = None,
    ):
        if options.processes is not None:
            require_positive(processes=options.processes)
        self.threads, self._command, self._config = options.threads, command, config
        self._processes = options.processes or processes_for(device, options.threads)
        if most is not None:
            self._processes = min(self._processes, most)
        memory = weight_bytes(cast("DuoConfig", model.config), model.dtype) + _PROCESS
        self._needs = Needs(options.threads or 1, int(device.type == "cuda"), memory)
        self._ray = options.cluster and connect(options.cluster, self._needs)
        self.apart = bool(self._ray) or self._processes > 1

    def placed(self, job: Job, again: Function, folder: Path) -> Job:
        """A job of a run in a folder as it runs here; in another process by `again`, which gets the folder as `run`."""
        return replace(job, function=again, arguments={"run": folder, **job.arguments}) if self.apart else job

    def finish(self, jobs: list[Job], folder: Path) -> None:
        """Run the jobs of a run in a folder that are not finished; errors as for `finish_all`."""
        if self._ray:
            inputs = files_read(self._command, self._config)
            place: Executor = OnCluster(self._ray, folder, self._needs, len(jobs), inputs)
        else:
            place = executor(min(self._processes, len(jobs)), self.threads)
        finish_all(jobs, place, folder)


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


def do_apart(run: Path, work: str, tell: Tell, **arguments: Any) -> dict[str, Any]:
    """Do a piece of work, a key of `WORK`, in another process, with a workbench from the run's configuration."""
    return WORK[work](_bench(run), tell=tell, **arguments)


def rank(bench: Workbench, tell: Tell) -> dict[str, Any]:
    """Rank the fixed patterns: the function of a job.

    Args:
        bench: workbench of the run.
        tell: called with what will be searched, then with the number of patterns so far.

    Returns:
        `baseline`, its state, and with targets `patterns`, the best of every number of big layers.
    """
    options = bench.options
    given = {"actions": options.actions, "options": options.evaluation}
    choice = choose(bench.model, bench.training, bench.held_out, **given)
    tell(line=choice.text(flops_per_second(bench.model, bench.training)))

    def tried(count: int) -> None:
        tell(completed=count, total=choice.patterns)
        interrupts.check()

    baseline = Baseline.search(
        bench.model,
        bench.training,
        method=choice.baseline,
        actions=options.actions,
        price=bench.price,
        options=choice.options,
        tried=tried,
    )
    baseline.at_price(bench.price)
    patterns = list(baseline.per_big().values()) if options.targets else []
    return {"baseline": baseline.state(), "patterns": patterns}


def climb_fixed(bench: Workbench, place: Path, tell: Tell) -> dict[str, Any]:
    """Measure the best fixed pattern of every number of big layers on each text: the function of a job.

    Args:
        bench: workbench of the run.
        place: folder of the job that ranked the patterns.
        tell: called after every text.
    """
    patterns = json.loads((place / RESULT).read_text())["patterns"]
    _climb_texts(bench, [PatternRouter(route) for route in patterns], place, tell)
    return {}


def climb(bench: Workbench, router: Path, tell: Tell) -> dict[str, Any]:
    """Measure a router at several prices on each text: the function of a job.

    Args:
        bench: workbench of the run.
        router: folder of the router.
        tell: called after every text.
    """
    loaded = load_router(router).to(bench.model.device)
    low, high = bench.prices or (0.0, 0.0)
    falling = (high * (low / high) ** (step / (_STEPS - 1)) for step in range(_STEPS))  # so compute rises
    steps = [loaded.at(price=price) for price in falling]
    if bench.options.reach_targets:
        steps += [_calibrated(bench, loaded, target, steps[-1]) for target in _around(bench.options.targets)]
    _climb_texts(bench, steps, router, tell)
    return {}


def _climb_texts(bench: Workbench, steps: Sequence[Router], place: Path, tell: Tell) -> None:
    """Measure routers, the steps of a ladder, on each text, and write the ladders in a folder; see `ladder_path`."""
    texts = held_out_texts(bench)
    for done, (text, windows) in enumerate(texts.items()):
        tell(completed=done, total=len(texts), note=text)
        if (path := ladder_path(place, text)).exists():  # measured before the run was stopped
            continue
        with writing(path) as beside:
            own = router_text(bench, text).tokens
            Ladder.climb(bench.model, steps, windows.tokens, own, between=interrupts.check).save(beside)


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
    return {name: bench.read([name], split="evaluation").first(bench.sizes.windows) for name in names}


@lru_cache
def router_text(bench: Workbench, text: str) -> Windows:
    """The first windows of a text's router split: they decide which steps of a ladder are mixed, and calibrate."""
    return bench.read([text], split="router").first(bench.sizes.final_windows)


def ladder_path(router: Path, text: str) -> Path:
    """File of the measurements of a router at several prices on a text."""
    return router / f"ladder-{text.replace('/', '_')}.safetensors"


WORK: dict[str, Callable[..., dict[str, Any]]] = {
    "train": Workbench.train,
    "rank": rank,
    "climb": climb,
    "climb fixed": climb_fixed,
}
"""What the jobs of a comparison do."""


@lru_cache(maxsize=1)
def _bench(run: Path) -> Workbench:
    torch.manual_seed(0)
    return Workbench(*again("compare", run))
