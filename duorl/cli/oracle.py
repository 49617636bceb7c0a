"""`duorl oracle`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from jsonargparse import Namespace
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from duorl.checks import require_positive
from duorl.cli.console import console, say, typed_command
from duorl.cli.material import Material
from duorl.cli.parser import read_config
from duorl.evaluation import RouteSearchOptions, RouteSearchPlan, flops_per_second, plan_route_search, search_routes
from duorl.evaluation.difficulty import TokenRow, named_rows, save_table
from duorl.files import write_json, write_text, writing
from duorl.models import DuoForCausalLM
from duorl.prices import check_price
from duorl.reports import page
from duorl.reports.figures import budget_table


def prepare(options: Namespace, config: str) -> tuple[str, Callable[[Path], None]]:
    """What searches the routes.

    Raises:
        ValueError, OSError: the input cannot be used, or the search is impossible.
    """
    require_positive(windows=options.windows)
    check_price(options.price)
    material = Material.of(options, options.window)
    model, tokenizer = material.model, material.tokenizer
    tokens = material.read(options.corpus, split="evaluation").tokens[: options.windows].to(model.device)
    asked = RouteSearchOptions(
        method=options.method,
        context=options.context,
        actions=tuple(options.actions),
        price=options.price,
        memory_limit=options.memory_limit,
        seed=options.seed,
    )
    plan = plan_route_search(model, tokens, asked)
    return "oracle", partial(_run, config, model, tokenizer, tokens, asked, plan)


def _run(
    config: str,
    model: DuoForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Tensor,
    asked: RouteSearchOptions,
    plan: RouteSearchPlan,
    folder: Path,
) -> None:
    say(plan.text(flops_per_second(model, tokens)))
    with console.status("search routes"):
        found = search_routes(model, tokens, tokenizer, asked)
    console.print(budget_table(found.rows, found.title) if found.rows else found.title)
    say(found.summary)
    write_json(folder / "oracle.json", {"settings": read_config(config), **found.numbers})
    if found.difficulty:
        title = (
            "Token difficulty" if found.exact else f"Token difficulty, at least: the routes are those of {found.method}"
        )
        settings = {"command": typed_command(), **read_config(config)}
        _write_difficulty(found.difficulty, found.exact, title, settings, folder)
    say(f"wrote {folder}/: " + ", ".join(sorted(path.name for path in folder.glob("[!.]*.*"))))


def _write_difficulty(rows: list[TokenRow], exact: bool, title: str, settings: dict, folder: Path) -> None:
    for ending in ("csv", "parquet"):
        with writing(folder / f"tokens.{ending}") as beside:
            save_table(rows, beside, exact=exact)
    text = page.text_page(title, settings, named_rows(rows, exact=exact))
    write_text(folder / "difficulty.html", text)
