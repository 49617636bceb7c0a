"""`duorl train`: train one agent and its rivals, and compare their routers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from duorl import ranks
from duorl.experiments.comparing import (
    MIX,
    RESULTS,
    check_evaluation,
    compare,
    fixed_mix,
    make_comparer,
    unlearned,
    write,
    write_cards,
)
from duorl.experiments.trainings import Place, finish_all
from duorl.experiments.voice import command, say, say_written
from duorl.experiments.workbench import Workbench
from duorl.routers import Router
from duorl.routers import load as load_router
from duorl.runs.jobs import InProcess, Job


def prepare(options: Namespace, config: dict[str, Any]) -> tuple[str, Callable[[Path], None]]:
    """The default name of the run's folder, and the function that runs in it.

    Args:
        options: `RunOptions` with `agent` in place of `agents`, and the folder flags.
        config: the options as plain values.

    Raises:
        ValueError, OSError: bad input; the message names it and the fix.
    """
    bench = Workbench(options, config)
    check_evaluation(options, bench.model, bench.training, bench.held_out)
    return bench.agents[0].lower(), partial(_run, bench)


def plan(bench: Workbench, folder: Path) -> list[Job]:
    """The trainings of the agent and its rivals; with a target, rivals use the price that the agent found."""
    (agent,), seed = bench.agents, bench.options.seed
    place = folder / "router"
    common: dict[str, Any] = {"seed": seed, "price_from": None}
    events = folder / "tensorboard" / agent
    jobs = [Job(agent, place, bench.train, {**common, "name": agent, "place": place, "events": events})]
    for name in bench.rivals:
        rival = Place(name, seed, folder)
        arguments = {**common, "name": name, "place": rival.router, "events": rival.events}
        if bench.target is not None:
            arguments["price_from"] = place
        jobs.append(Job(name, rival.router, bench.train, arguments, after=(agent,) if bench.target else ()))
    return jobs


def _run(bench: Workbench, folder: Path) -> None:
    """Train what is not in the folder yet, compare, and print where the results are."""
    jobs, options = plan(bench, folder), bench.options
    for note in bench.notes:
        say(note)
    finish_all(jobs, InProcess(), folder)
    if not ranks.first():
        return
    price = jobs[0].result["price"]
    routers = {job.name: load_router(job.place).to(bench.model.device) for job in [*jobs[1:], jobs[0]]}
    comparer = make_comparer(
        options,
        bench.model,
        bench.training,
        bench.held_out,
        price,
        files=bench.evaluation.files,
    )
    deployed = {name: [bench.deployed(router, price)] for name, router in routers.items()}
    mix = fixed_mix(comparer, deployed[jobs[0].name][0], bench.validation)
    for router in mix.get(MIX, []):
        router.save_pretrained(folder / "routers" / MIX)
    everything: dict[str, list[Router]] = {
        **unlearned(options.actions, options.seed),
        "best fixed": [comparer.fixed],
        **mix,
        **deployed,
    }
    comparison = compare(comparer, everything, {"command": command(), "price": price, **bench.config})
    write(comparison, comparer.traces(bench.tokenizer), folder)
    write_cards(comparison, [(job.name, job.place) for job in jobs])
    say_written(folder, *RESULTS, "router/", "routers/", "config.yaml")
