"""`duorl compare`: every learner with every seed, side by side on the machine's cores, then all in one table."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from torch import Tensor

from duorl import report
from duorl.budgets import Ladder, budget_rows, ladder_prices, summaries
from duorl.checks import require_positive
from duorl.cli.folders import check_folder, check_same_options, make_folder
from duorl.cli.train import progress_bars, say_logdir, unlearned
from duorl.cli.workbench import Workbench, console, typed_command, write
from duorl.corpus import source_names
from duorl.costs import ACTIONS
from duorl.figures import budget_frontiers, budgets_markdown
from duorl.processes import side_by_side
from duorl.routers import ConstantRouter, Router
from duorl.routers import load as load_router

_KNOWABLE = "knowable"
_STEPS = 7  # of a ladder of prices


@dataclass(frozen=True)
class _Job:
    """One training: which learner, with which seed, one of several or not, in which run's folder."""

    name: str
    seed: int
    run: Path
    several: bool

    @property
    def place(self) -> Path:
        """Folder of its router."""
        return self._own("routers")

    @property
    def events(self) -> Path:
        """Folder of its TensorBoard events."""
        return self._own("tensorboard")

    def _own(self, kind: str) -> Path:
        folder = self.run / kind / self.name
        return folder / f"seed-{self.seed}" if self.several else folder


class Compare:
    """Everything that can be wrong with the input is found before a folder is made.

    Args:
        options: `RunOptions` and the folder flags.
        config: the resolved options as YAML.

    Raises:
        ValueError, OSError: the input cannot be used; the message names the thing and the fix.
    """

    def __init__(self, options: Namespace, config: str):
        self.options, self.config = options, config
        check_folder(options)
        check_same_options(options, config)
        require_positive(seeds=options.seeds)
        if options.targets and options.env.prices is None:
            raise ValueError("targets compares routers over a range of prices: give env.prices, the lowest and highest")
        if not all(0 < target < 1 for target in options.targets):
            raise ValueError(f"targets must be computes between 0 and 1, not {options.targets}")
        self.bench = Workbench(options)
        self._check_names()
        for name, factory in options.agents.items():
            self.bench.agent(factory, options.seed, name)

    def _check_names(self) -> None:
        if not self.options.agents:
            raise ValueError("no agents to compare: name at least one in `agents`")
        taken = {*unlearned(["small"], 0), "best fixed", "oracle", _KNOWABLE, *self.options.rivals}
        if unknown := set(self.options.own_env) - set(self.options.agents):
            raise ValueError(f"own_env names {min(unknown)!r}, which is not among the agents")
        for name in self.options.agents:
            if name in taken or Path(name).name != name:
                raise ValueError(f"an agent cannot be called {name!r}: the comparison or the folder needs that name")

    def __call__(self) -> None:
        """Train what the folder does not hold yet, compare, and say where everything is."""
        self.folder = make_folder(self.options, "compare", self.config)
        jobs = self._jobs()
        self._train(jobs)
        learned = {name: [self._load(job) for job in jobs if job.name == name] for name in self._learners()}
        self._compare(learned)
        if self.options.targets:
            self._compare_budgets(jobs)
        console.print(f"\nwrote {self.folder}/: report.html, comparison.json and .csv, figures/, routers/, config.yaml")
        say_logdir(self.folder)

    def _learners(self) -> list[str]:
        """Names of all that is trained with every seed; tables have them in this order."""
        return [*self.options.rivals, *self.options.agents]

    def _jobs(self) -> list[_Job]:
        options = self.options
        seeds = range(options.seed, options.seed + options.seeds)
        several = len(seeds) > 1
        jobs = [_Job(name, seed, self.folder, several) for seed in seeds for name in self._learners()]
        knowable = [_Job(_KNOWABLE, options.seed, self.folder, several=False)] if options.knowable else []
        return [*jobs, *knowable]

    def _train(self, jobs: Sequence[_Job]) -> None:
        """Every job in one of the processes that run side by side."""
        processes = min(self.options.processes or torch.get_num_threads(), len(jobs))
        with side_by_side(processes) as pool, progress_bars() as progress:
            task = progress.add_task("train", total=len(jobs), note="")
            running: dict[Future, _Job] = {pool.submit(_work, job): job for job in jobs}
            for done in as_completed(running):
                done.result()
                job = running[done]
                progress.update(task, advance=1, note=f"{job.name}, seed {job.seed}: done")

    def _load(self, job: _Job) -> Router:
        return load_router(job.place).to(self.bench.model.device)

    def _compare(self, learned: dict[str, list[Router]]) -> None:
        """All routers at the run's price."""
        with console.status("measure on held-out text"):
            bench, options = self.bench, self.options
            comparer = bench.comparer()
            if options.knowable:
                comparer.knowable = bench.deployed(load_router(self.folder / "routers" / _KNOWABLE))
            routers: dict[str, list[Router]] = {
                **{name: [router] for name, router in unlearned(options.actions, options.seed).items()},
                "best fixed": [comparer.fixed],
                **{name: [bench.deployed(router) for router in seeds] for name, seeds in learned.items()},
                "oracle": [comparer.oracle],
            }
            comparison = comparer.compare(routers, bench.settings(self.config))
            self.patterns = comparer.best_patterns() if options.targets else []
        write(comparison, comparer.traces(bench.tokenizer), self.folder)

    def _compare_budgets(self, jobs: Sequence[_Job]) -> None:
        """All routers at equal compute, on each text."""
        texts: dict[str, dict[str, Any]] = {}
        for text, windows in held_out_texts(self.bench).items():
            ladders = {"best fixed": [Ladder.climb(self.bench.model, self.patterns, windows)]}
            for name in self._learners():
                ladders[name] = [Ladder.load(_ladder_path(job, text)) for job in jobs if job.name == name]
            texts[text] = {"tokens": windows[:, 1:].numel(), **self._budgets(ladders, windows)}
        numbers = {"command": typed_command(), "texts": texts}
        (self.folder / "budgets.json").write_text(json.dumps(numbers, indent=1))
        (self.folder / "budgets.md").write_text(budgets_markdown(numbers))
        for text, found in texts.items():
            name = text.replace("/", "_")
            budget_frontiers(found, text).savefig(self.folder / "figures" / f"budgets-{name}.png", dpi=150)
        report.write(self.folder)

    def _budgets(self, ladders: dict[str, list[Ladder]], windows: Tensor) -> dict[str, Any]:
        constant = [ConstantRouter(name) for name in ACTIONS[1:]]
        small, big = Ladder.climb(self.bench.model, constant, windows).loss.tolist()
        resamples = self.options.evaluation.resamples
        return {
            "all_big": big,
            "rows": budget_rows(ladders, self.options.targets, resamples=resamples),
            "routers": summaries(ladders, level=big, worst_loss=small, resamples=resamples),
        }


def held_out_texts(bench: Workbench) -> dict[str, Tensor]:
    """The first windows of every source's evaluation split, (W, T+1), by the source's name."""
    count = bench.options.evaluation.windows
    return {name: bench.read([name], split="evaluation")[:count] for name in source_names(bench.options.corpus)}


def _ladder_path(job: _Job, text: str) -> Path:
    return job.place / f"ladder-{text.replace('/', '_')}.safetensors"


def _work(job: _Job) -> None:
    """A job, in a process of its own: train unless the folder holds the router, measure unless it holds the ladder."""
    bench, config = _bench(job.run)
    if not (job.place / "router.json").is_file():
        shutil.rmtree(job.events, ignore_errors=True)  # an interrupted training's curve would lie under the new one
        _make(bench, job, config).save_pretrained(job.place)
    if bench.options.targets and job.name != _KNOWABLE:
        router = load_router(job.place).to(bench.model.device)
        steps = [router.at(price=price) for price in ladder_prices(bench.prices, _STEPS)]
        for text, windows in held_out_texts(bench).items():
            if not (path := _ladder_path(job, text)).is_file():
                Ladder.climb(bench.model, steps, windows).save(path)


def _make(bench: Workbench, job: _Job, config: str) -> Router:
    if job.name not in bench.options.agents:
        return bench.rival(job.name, job.seed)
    agent = bench.agent(bench.options.agents[job.name], job.seed, job.name)
    return bench.learn(agent, job.name, job.events, config, lambda **_: None)


@lru_cache(maxsize=1)
def _bench(folder: Path) -> tuple[Workbench, str]:
    """What a run's own configuration describes, read once per process."""
    from duorl.cli.parser import parse

    torch.manual_seed(0)
    _, options, config = parse(["compare", "--config", str(folder / "config.yaml")])
    return Workbench(options), config
