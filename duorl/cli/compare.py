"""`duorl compare`: train every learner with every seed, in parallel, and compare all routers in one table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace

from duorl.checks import require_positive
from duorl.cli.comparing import check_evaluation, compare, make_comparer, unlearned, write, write_cards
from duorl.cli.console import say, say_logdir, typed_command
from duorl.cli.trainings import (
    Place,
    climb,
    climb_apart,
    finish_all,
    held_out_texts,
    ladder_path,
    router_text,
    train_apart,
)
from duorl.cli.workbench import KNOWABLE, Workbench
from duorl.corpus import Windows, source_names
from duorl.costs import ACTIONS
from duorl.devices import processes_for
from duorl.evaluation.budgets import Ladder, budget_rows, summaries
from duorl.evaluation.compare import Comparer
from duorl.evaluation.transfer import transfer_rows
from duorl.files import write_json, write_text, writing
from duorl.reports import page
from duorl.reports.figures import budget_frontiers, budgets_markdown
from duorl.routers import ConstantRouter, Router
from duorl.runs.jobs import Job, executor


def prepare(options: Namespace, config: str) -> tuple[str, Callable[[Path], None]]:
    """The default name of the run's folder, and the function that runs in it.

    Args:
        options: `RunOptions` and the folder flags.
        config: the resolved options as YAML.

    Raises:
        ValueError, OSError: bad input; the message names it and the fix.
    """
    require_positive(seeds=options.seeds)
    if options.processes is not None:
        require_positive(processes=options.processes)
    if options.targets and options.env.prices is None:
        raise ValueError("targets compares routers over a range of prices: give env.prices, the lowest and highest")
    if not all(0 < target < 1 for target in options.targets):
        raise ValueError(f"targets must be computes between 0 and 1, not {options.targets}")
    for name in ("transfer", "reach_targets"):
        if options[name] and not options.targets:
            raise ValueError(f"{name} is about the comparison at targets: give targets, for instance '[0.5]'")
    bench = Workbench(options, config)
    check_evaluation(options, bench.model, bench.training, bench.held_out)
    if options.targets:
        for text in held_out_texts(bench):  # each text must have an evaluation split of its own
            router_text(bench, text)
    return "compare", Compare(bench)


class Compare:
    """A comparison that can be run in a folder.

    Args:
        bench: workbench of the run.
    """

    def __init__(self, bench: Workbench):
        self.bench, self.options = bench, bench.options
        self.names = [*bench.rivals, *bench.agents]  # tables have them in this order

    def __call__(self, folder: Path) -> None:
        """Train what is not in the folder yet, compare, and print where the results are."""
        threads = self.options.threads
        processes = self.options.processes or processes_for(self.bench.model.device, threads)
        jobs = self.jobs(folder, apart=processes > 1)
        finish_all(jobs, executor(min(processes, len(jobs)), threads), folder)
        comparer = self._compare(folder)
        if self.options.targets:
            self._compare_budgets(folder, comparer)
        say(f"\nwrote {folder}/: report.html, comparison.json and .csv, figures/, routers/, config.yaml")
        say_logdir(folder)

    def places(self, folder: Path) -> list[Place]:
        """The place of every learner with every seed."""
        seeds = range(self.options.seed, self.options.seed + self.options.seeds)
        return [Place(name, seed, folder, len(seeds) > 1) for seed in seeds for name in self.names]

    def jobs(self, folder: Path, *, apart: bool) -> list[Job]:
        """The jobs of all trainings, then those that measure routers at several prices.

        Args:
            folder: folder of the run.
            apart: the jobs run in other processes, which read the run's configuration again.
        """
        where: dict[str, Any] = {"run": str(folder)} if apart else {}
        learn: Callable[..., dict[str, Any]] = train_apart if apart else self.bench.train
        measure: Callable[..., dict[str, Any]] = climb_apart if apart else partial(climb, self.bench)
        jobs, ladders, options = [], [], self.options
        places = self.places(folder)
        knowable = [Place(KNOWABLE, options.seed, folder)] if options.knowable else []
        for place in [*places, *knowable]:
            events = place.router / "tensorboard" if place.name == KNOWABLE else place.events
            arguments = {"name": place.name, "seed": place.seed, "place": str(place.router), "events": str(events)}
            waits: tuple[str, ...] = ()
            if place.name in options.starts:
                first = replace(place, name=options.starts[place.name])
                arguments["start"], waits = str(first.router), (first.job,)
            jobs.append(Job(place.job, place.router, learn, {**where, **arguments}, after=waits))
            if options.targets and place.name != KNOWABLE:
                arguments = {**where, "router": str(place.router)}
                ladder = Job(f"{place.job}: ladder", place.router / "ladder", measure, arguments, after=(place.job,))
                ladders.append(ladder)
        return [*jobs, *ladders]

    def _compare(self, folder: Path) -> Comparer:
        """Compare all routers at the run's price."""
        bench, options, places = self.bench, self.options, self.places(folder)
        learned = {name: [place.load(bench) for place in places if place.name == name] for name in self.names}
        decisions = options.total_decisions * len(places)
        comparer = make_comparer(
            options,
            bench.model,
            bench.training,
            bench.held_out,
            bench.price,
            files=bench.evaluation.files,
            decisions=decisions,
            routers=len(places) + 6,
        )
        if options.knowable:
            knowable = Place(KNOWABLE, options.seed, folder).load(bench)
            comparer.knowable = bench.deployed(knowable, bench.price)
        routers: dict[str, list[Router]] = {
            **unlearned(options.actions, options.seed),
            "best fixed": [comparer.fixed],
            **{name: [bench.deployed(router, bench.price) for router in seeds] for name, seeds in learned.items()},
        }
        comparison = compare(comparer, routers, {"command": typed_command(), "price": bench.price, **bench.config})
        write(comparison, comparer.traces(bench.tokenizer), folder)
        write_cards(comparison, [(place.name, place.router) for place in places])
        return comparer

    def _compare_budgets(self, folder: Path, comparer: Comparer) -> None:
        """Compare all routers at equal compute, on each text."""
        bench, learned = self.bench, source_names(self.options.corpus)
        patterns, held_out, texts = comparer.best_patterns(), held_out_texts(bench), {}
        ladders = {text: self._ladders(folder, text, windows, patterns) for text, windows in held_out.items()}
        for text, windows in held_out.items():
            texts[text] = {"tokens": windows.tokens[:, 1:].numel(), **self._budgets(ladders[text], windows)}
            if self.options.transfer:
                at_home = [ladders[name] for name in learned]
                rows = transfer_rows(ladders[text], at_home, self.options.targets, windows.files)
                texts[text]["transfer"] = {"learned": text in learned, "rows": rows}
        numbers = {"command": typed_command(), "texts": texts}
        write_json(folder / "budgets.json", numbers)
        write_text(folder / "budgets.md", budgets_markdown(numbers))
        for text, found in texts.items():
            with writing(folder / "figures" / f"budgets-{text.replace('/', '_')}.png") as beside:
                budget_frontiers(found, text).savefig(beside, dpi=150)
        page.write(folder)

    def _ladders(
        self, folder: Path, text: str, windows: Windows, patterns: Sequence[Router]
    ) -> dict[str, list[Ladder]]:
        """By router the ladders of its seeds on a text; those of the fixed patterns are measured here."""
        fixed = Ladder.climb(self.bench.model, patterns, windows.tokens, router_text(self.bench, text))
        found = {"best fixed": [fixed]}
        for place in self.places(folder):
            found.setdefault(place.name, []).append(Ladder.load(ladder_path(place.router, text)))
        return found

    def _budgets(self, ladders: dict[str, list[Ladder]], windows: Windows) -> dict[str, Any]:
        constant = [ConstantRouter(name) for name in ACTIONS[1:]]
        small, big = Ladder.climb(self.bench.model, constant, windows.tokens).losses
        level, files = big.mean().item(), windows.files
        rows, length = budget_rows(ladders, self.options.targets, files), windows.tokens.shape[1] - 1
        for row in rows:  # equal computes are equal FLOPs
            row["flops_per_token"] = self.bench.model.flops.token(torch.tensor(row["target"]), (length + 1) / 2).item()
        return {
            "all_big": level,
            "rows": rows,
            "routers": summaries(ladders, level=level, worst=small, files=files),
        }
