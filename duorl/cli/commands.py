"""The commands that are one function: evaluate, oracle, report, dense, pretrain.

Each prepares: everything that can be wrong with the input is found before a folder is made, and what does the work is
returned.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import yaml
from jsonargparse import Namespace
from rich.markdown import Markdown

from duorl import dense, report
from duorl.checks import require_positive
from duorl.cli.folders import check_folder, check_same_options, make_folder
from duorl.cli.workbench import console, make_comparer, typed_command, write
from duorl.corpus import load_windows
from duorl.costs import action_ids
from duorl.dense import DenseOptions
from duorl.difficulty import save_table, token_difficulty
from duorl.evaluate import check_searches, measure
from duorl.figures import budget_table
from duorl.models import load, load_tokenizer
from duorl.models.pretrain import Pretraining, PretrainOptions
from duorl.oracle import count_routes, exhaustive
from duorl.oracle.search import states_within
from duorl.rewards import LossImprovement
from duorl.routers import Router
from duorl.routers import load as load_router


def evaluate_command(options: Namespace, config: str) -> Callable[[], None]:
    """Prepare `duorl evaluate`."""
    action_ids(options.actions)
    price = LossImprovement(options.price).price
    model, tokenizer = load(options.model, skip=options.skip), load_tokenizer(options.model)
    router = load_router(options.router).to(model.device)
    if router.takes_price:
        router = router.at(price=price)
    require_positive(window=options.window)
    counts = options.evaluation.fixed_windows, options.evaluation.reference_windows
    check_searches(model, options.window, options.actions, *counts)
    read = partial(load_windows, options.corpus, tokenizer, length=options.window)
    training, held_out = read(split="router"), read(split="evaluation")
    measure(model, router, held_out[:1])  # a router of another model's sizes fails here
    check_folder(options)

    def run() -> None:
        comparer = make_comparer(options, model, training, held_out, price)
        routers: dict[str, list[Router]] = {
            f"{options.router}": [router],
            "best fixed": [comparer.fixed],
            "oracle": [comparer.oracle],
        }
        comparison = comparer.compare(routers, {"command": typed_command(), **yaml.safe_load(config)})
        folder = make_folder(options, "evaluate", config)
        write(comparison, comparer.traces(tokenizer), folder)
        console.print(f"wrote {folder}/: report.html, comparison.json and .csv, figures/")

    return run


def oracle_command(options: Namespace, config: str) -> Callable[[], None]:
    """Prepare `duorl oracle`."""
    require_positive(window=options.window, windows=options.windows)
    model, tokenizer = load(options.model, skip=options.skip), load_tokenizer(options.model)
    routes = count_routes(model.num_layers, options.actions)
    tokens = load_windows(options.corpus, tokenizer, split="evaluation", length=options.window)[: options.windows]
    states_within(options.memory_limit, model, len(tokens), options.window, routes)
    LossImprovement(options.price)
    check_folder(options)

    def run() -> None:
        found = exhaustive(
            model,
            tokens,
            context=options.context,
            actions=options.actions,
            price=options.price,
            memory_limit=options.memory_limit,
        )
        # A committed context belongs to one budget: other budgets' routes in it are not what anybody deploys.
        rows = found.by_budget() if found.committed is None else []
        best = found.best(options.price)
        lucky = found.best_of_random(100, generator=torch.Generator().manual_seed(options.seed), price=options.price)
        title = f"{options.context} context, {lucky.numel():,} held-out tokens"
        console.print(budget_table(rows, title) if rows else title)
        random_loss, best_loss = (found.loss(index).mean().item() for index in (lucky, best))
        spent = found.compute[best].mean().item()
        console.print(
            f"per token, at price {options.price:g}: oracle {best_loss:.4f} at compute {spent:.3f}, "
            f"best of 100 random {random_loss:.4f}"
        )
        folder = make_folder(options, "oracle", config)
        numbers = {
            "settings": yaml.safe_load(config),
            "rows": rows,
            "oracle": best_loss,
            "oracle_compute": spent,
            "best_of_100_random": random_loss,
        }
        (folder / "oracle.json").write_text(json.dumps(numbers, indent=1))
        if {"small", "big"} <= set(options.actions):
            difficulty = token_difficulty(found, tokens, tokenizer, price=options.price)
            save_table(difficulty, folder / "tokens.csv")
            save_table(difficulty, folder / "tokens.parquet")
            settings = {"command": typed_command(), **yaml.safe_load(config)}
            page = report.text_page("Token difficulty", settings, [row._asdict() for row in difficulty])
            (folder / "difficulty.html").write_text(page)
        console.print(f"wrote {folder}/: " + ", ".join(sorted(path.name for path in folder.glob("*.*"))))

    return run


def report_command(options: Namespace, config: str) -> Callable[[], None]:
    """Prepare `duorl report`."""
    folder = Path(options.run)
    report.page(folder)
    return lambda: console.print(f"wrote {report.write(folder)}")


def dense_command(options: Namespace, config: str) -> Callable[[], None]:
    """Prepare `duorl dense`."""
    check_folder(options)
    check_same_options(options, config)
    fields = {name: getattr(options, name) for name in DenseOptions.__dataclass_fields__}
    settings = DenseOptions(**fields)
    first = dense.plan(settings.recipe, settings.shares, Path())["duo"]
    tokenizer = Pretraining(first).tokenizer  # the recipe and its text are found good
    for text in settings.texts:
        dense.evaluation_windows(text, tokenizer, settings)

    def run() -> None:
        folder = make_folder(options, "dense", config)
        dense.train(dense.plan(settings.recipe, settings.shares, folder), settings.processes)
        rows = dense.measure_all(settings, folder)
        numbers = {"settings": {"command": typed_command(), **yaml.safe_load(config)}, "rows": rows}
        (folder / "dense.json").write_text(json.dumps(numbers, indent=1))
        (folder / "dense.md").write_text(dense.markdown(rows))
        console.print(Markdown(dense.markdown(rows)))
        console.print(f"wrote {folder}/: dense.json, dense.md, and a folder for each model")

    return run


def pretrain_command(options: Namespace, config: str) -> Callable[[], None]:
    """Prepare `duorl pretrain`."""
    check_folder(options)
    fields = {name: getattr(options, name) for name in PretrainOptions.__dataclass_fields__}
    job = Pretraining(PretrainOptions(**fields), resume=options.resume)

    def run() -> None:
        folder = make_folder(options, "pretrain", config)
        job.run()
        console.print(f"wrote {folder}/: load it with --model {folder}")

    return run
