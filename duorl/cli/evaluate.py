"""`duorl evaluate`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from jsonargparse import Namespace

from duorl.checks import require_positive
from duorl.cli.comparing import check_evaluation, compare, make_comparer, write
from duorl.cli.console import say, typed_command
from duorl.cli.parser import read_config
from duorl.corpus import read_windows
from duorl.costs import action_ids
from duorl.evaluation.measure import measure
from duorl.models import load, load_tokenizer
from duorl.rewards import LossImprovement
from duorl.routers import Router
from duorl.routers import load as load_router


def prepare(options: Namespace, config: str) -> tuple[str, Callable[[Path], None]]:
    """The default name of the folder, and the function that measures the router.

    Raises:
        ValueError, OSError: the input cannot be used; the message names the thing and the fix.
    """
    action_ids(options.actions)
    require_positive(window=options.window)
    price = LossImprovement(options.price).price
    router = load_router(options.router)
    if router.takes_price:
        router = router.at(price=price)
    model, tokenizer = load(options.model, skip=options.skip), load_tokenizer(options.model)
    router = router.to(model.device)
    read = partial(read_windows, options.corpus, tokenizer, length=options.window)
    training, (held_out, files) = read(split="router").tokens, read(split="evaluation")
    measure(model, router, held_out[:1])  # a router of another model's sizes fails here
    check_evaluation(options, model, training, held_out)

    def work(folder: Path) -> None:
        comparer = make_comparer(options, model, training, held_out, price, files=files, routers=3)
        routers: dict[str, list[Router]] = {_row_name(options.router): [router], "best fixed": [comparer.fixed]}
        comparison = compare(comparer, routers, {"command": typed_command(), **read_config(config)})
        write(comparison, comparer.traces(tokenizer), folder)
        say(f"wrote {folder}/: report.html, comparison.json and .csv, figures/")

    return "evaluate", work


def _row_name(router: str) -> str:
    """The last two parts of its folder's path."""
    return "/".join(Path(router).parts[-2:])
