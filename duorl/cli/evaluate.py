"""`duorl evaluate`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jsonargparse import Namespace
from torch import Tensor

from duorl.cli.comparing import check_evaluation, compare, make_comparer, write
from duorl.cli.console import say, typed_command
from duorl.cli.material import Material
from duorl.cli.parser import read_config
from duorl.costs import ACTIONS, action_ids
from duorl.evaluation.measure import measure
from duorl.models import DuoForCausalLM
from duorl.prices import check_price
from duorl.routers import LogitRouter, Router
from duorl.routers import load as load_router


def prepare(options: Namespace, config: str) -> tuple[str, Callable[[Path], None]]:
    """The default name of the folder, and the function that measures the router.

    Raises:
        ValueError, OSError: the input cannot be used; the message names the thing and the fix.
    """
    action_ids(options.actions), action_ids([options.reference])
    price = check_price(options.price)
    router = load_router(options.router)
    if router.takes_price:
        router = router.at(price=price)
    _check_actions(router, options)
    material = Material.of(options, options.window)
    model, tokenizer = material.model, material.tokenizer
    router = router.to(model.device)
    router.require_fit(model)
    training = material.read(options.corpus, split="router").tokens
    held_out, files = material.read(options.corpus, split="evaluation")
    _try(router, model, held_out[:1])
    check_evaluation(options, model, training, held_out)

    def work(folder: Path) -> None:
        comparer = make_comparer(options, model, training, held_out, price, files=files, routers=3)
        routers: dict[str, list[Router]] = {_row_name(options.router): [router], "best fixed": [comparer.fixed]}
        comparison = compare(comparer, routers, {"command": typed_command(), **read_config(config)})
        write(comparison, comparer.traces(tokenizer), folder)
        say(f"wrote {folder}/: report.html, comparison.json and .csv, figures/")

    return "evaluate", work


def _check_actions(router: Router, options: Namespace) -> None:
    """Refuse a router with actions that the oracle may not take: it could be better than the bound."""
    if isinstance(router, LogitRouter):
        more = [ACTIONS[code] for code in router.codes.tolist() if ACTIONS[code] not in options.actions]
        if more:
            raise ValueError(f"{options.router} may take {more[0]}, which is not among --actions {options.actions}")


def _try(router: Router, model: DuoForCausalLM, windows: Tensor) -> None:
    """Run the router on one window, so that a bad router is refused before anything is written."""
    try:
        measure(model, router, windows)
    except Exception as error:  # a user's class may raise anything
        name = type(router).__name__
        raise ValueError(f"the router {name} fails on the first window: {type(error).__name__}: {error}") from error


def _row_name(router: str) -> str:
    """The last two parts of its folder's path."""
    return "/".join(Path(router).parts[-2:])
