"""`duorl compare`: train every learner with every seed, in parallel, and compare all routers in one table."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace

from duorl.checks import require_positive
from duorl.corpus import Windows, source_names
from duorl.costs import ACTIONS
from duorl.evaluation.budgets import MeasuredText, save_texts
from duorl.evaluation.frontier import Ladder
from duorl.evaluation.transfer import transfer_rows
from duorl.experiments.comparing import RESULTS, check_evaluation, compare, make_comparer, unlearned, write, write_cards
from duorl.experiments.trainings import WORK, Place, Workers, do_apart, held_out_texts, ladder_path, router_text
from duorl.experiments.voice import command, say, say_written
from duorl.experiments.workbench import KNOWABLE, Workbench
from duorl.files import write_json, write_text, writing
from duorl.reports import page
from duorl.reports.figures import budget_frontiers, budgets_markdown
from duorl.routers import ConstantRouter, Router
from duorl.runs.jobs import RESULT, Job

FIXED = "fixed"  # folder of the fixed patterns in a run's folder
LADDERS = "ladders.safetensors.gz"  # all ladders, from which budgets.json follows


def prepare(options: Namespace, config: dict[str, Any]) -> tuple[str, Callable[[Path], None]]:
    """The default name of the run's folder, and the function that runs in it.

    Args:
        options: `RunOptions` and the folder flags.
        config: the options as plain values.

    Raises:
        ValueError, OSError: bad input; the message names it and the fix.
    """
    require_positive(seeds=options.seeds)
    if options.targets and options.env.prices is None:
        raise ValueError("targets compares routers over a range of prices: give env.prices, the lowest and highest")
    if not all(0 < target < 1 for target in options.targets):
        raise ValueError(f"targets must be computes between 0 and 1, not {options.targets}")
    for name in ("transfer", "reach_targets"):
        if options[name] and not options.targets:
            raise ValueError(f"{name} is about the comparison at targets: give targets, for instance '[0.5]'")
    bench = Workbench(options, config)
    workers = Workers("compare", options, config, bench.model, bench.model.device)
    check_evaluation(options, bench.model, bench.training, bench.held_out)
    if options.targets:
        for text in held_out_texts(bench):  # each text must have an evaluation split and a router split of its own
            router_text(bench, text)
    return "compare", Compare(bench, workers)


class Compare:
    """A comparison that can be run in a folder.

    Args:
        bench: workbench of the run.
        workers: do its jobs.
    """

    def __init__(self, bench: Workbench, workers: Workers):
        self.bench, self.options, self.workers = bench, bench.options, workers
        self.names = [*bench.rivals, *bench.agents]  # tables have them in this order

    def __call__(self, folder: Path) -> None:
        """Train what is not in the folder yet, compare, and print where the results are."""
        for note in self.bench.notes:
            say(note)
        self.workers.finish(self.jobs(folder), folder)
        self._compare(folder)
        if self.options.targets:
            self._compare_budgets(folder)
        say_written(folder, *RESULTS, "budgets.json", "routers/", "config.yaml")

    def places(self, folder: Path) -> list[Place]:
        """The place of every learner with every seed."""
        seeds = range(self.options.seed, self.options.seed + self.options.seeds)
        return [Place(name, seed, folder, len(seeds) > 1) for seed in seeds for name in self.names]

    def jobs(self, folder: Path) -> list[Job]:
        """The jobs of all trainings in a run's folder, then those that measure routers at several prices."""

        def job(name: str, place: Path, work: str, arguments: dict[str, Any], *after: str) -> Job:
            here = Job(name, place, partial(WORK[work], self.bench), arguments, after)
            return self.workers.placed(here, partial(do_apart, work=work), folder)

        ladders, options, fixed = [], self.options, folder / FIXED
        jobs = [job("best fixed", fixed, "rank", {})]  # on a deep model it takes as long as a training
        if options.targets:
            ladders.append(job("best fixed: ladder", fixed / "ladder", "climb fixed", {"place": fixed}, "best fixed"))
        places = self.places(folder)
        knowable = [Place(KNOWABLE, options.seed, folder)] if options.knowable else []
        for place in [*places, *knowable]:
            arguments: dict[str, Any] = {"name": place.name, "seed": place.seed, "place": place.router}
            arguments["events"] = place.router / "tensorboard" if place.name == KNOWABLE else place.events
            waits: list[str] = []
            if place.name in options.starts:
                first = replace(place, name=options.starts[place.name])
                arguments["start"], waits = first.router, [first.job]
            jobs.append(job(place.job, place.router, "train", arguments, *waits))
            if options.targets and place.name != KNOWABLE:
                ladder = place.router / "ladder"
                ladders.append(job(f"{place.job}: ladder", ladder, "climb", {"router": place.router}, place.job))
        return [*jobs, *ladders]

    def _compare(self, folder: Path) -> None:
        """Compare all routers at the run's price."""
        bench, options, places = self.bench, self.options, self.places(folder)
        learned = {name: [place.load(bench) for place in places if place.name == name] for name in self.names}
        ranked = json.loads((folder / FIXED / RESULT).read_text())["baseline"]
        comparer = make_comparer(
            options,
            bench.model,
            bench.training,
            bench.held_out,
            bench.price,
            files=bench.evaluation.files,
            ranked=ranked,
        )
        if options.knowable:
            knowable = Place(KNOWABLE, options.seed, folder).load(bench)
            comparer.knowable = bench.deployed(knowable, bench.price)
        routers: dict[str, list[Router]] = {
            **unlearned(options.actions, options.seed),
            "best fixed": [comparer.fixed],
            **{name: [bench.deployed(router, bench.price) for router in seeds] for name, seeds in learned.items()},
        }
        comparison = compare(comparer, routers, {"command": command(), "price": bench.price, **bench.config})
        write(comparison, comparer.traces(bench.tokenizer), folder)
        write_cards(comparison, [(place.name, place.router) for place in places])

    def _compare_budgets(self, folder: Path) -> None:
        """Compare all routers at equal compute, on each text."""
        bench, learned = self.bench, source_names(self.options.corpus)
        measured = {text: self._measured(folder, text, windows) for text, windows in held_out_texts(bench).items()}
        save_texts(measured, folder / LADDERS)
        texts = {text: found.numbers(self.options.targets) for text, found in measured.items()}
        if self.options.transfer:
            at_home = [measured[name].ladders for name in learned]
            for text, found in measured.items():
                rows = transfer_rows(found.ladders, at_home, self.options.targets, found.files)
                texts[text]["transfer"] = {"learned": text in learned, "rows": rows}
        numbers = {"command": command(), "texts": texts}
        write_json(folder / "budgets.json", numbers)
        write_text(folder / "budgets.md", budgets_markdown(numbers))
        for text, tables in texts.items():
            with writing(folder / "figures" / f"budgets-{text.replace('/', '_')}.png") as beside:
                budget_frontiers(tables, text).savefig(beside, dpi=150)
        page.write(folder)

    def _measured(self, folder: Path, text: str, windows: Windows) -> MeasuredText:
        """The ladders of all routers on a text, by router, and what their tables need beside them."""
        ladders = {"best fixed": [Ladder.load(ladder_path(folder / FIXED, text))]}
        for place in self.places(folder):
            ladders.setdefault(place.name, []).append(Ladder.load(ladder_path(place.router, text)))
        model, length = self.bench.model, windows.tokens.shape[1] - 1
        small, big = Ladder.climb(model, [ConstantRouter(name) for name in ACTIONS[1:]], windows.tokens).losses
        fixed, all_big = (model.flops.token(torch.tensor(spent), (length + 1) / 2) for spent in (0.0, 1.0))
        flops = torch.stack([fixed, all_big - fixed])
        return MeasuredText(ladders, windows.files, router_text(self.bench, text).files, small, big, flops, length)
