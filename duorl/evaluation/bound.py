"""The bound of routers: routes that were found with the help of the labels.

`exhaustive` is the exact oracle. `descent` is coordinate descent from the best of some fixed patterns; its return is a
lower bound of the oracle's return, and a router may have a higher one. `none`: there is no bound.

    bound = find_bound("descent", model, windows, price=0.3, actions=("small", "big"), starts=baseline.starts(0.3))
    bound.name, bound.exact, bound.routes, bound.losses, bound.compute
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from duorl.costs import BIG, SMALL
from duorl.evaluation.difficulty import TokenRow, difficulty_rows, token_difficulty
from duorl.models.modeling import DuoForCausalLM
from duorl.oracle import Found, RouteTable, descent, exhaustive
from duorl.routed_pass import RoutedPass, remember
from duorl.routers import ReplayRouter

BoundMethod = Literal["exhaustive", "descent", "none"]
ROWS = {"exhaustive": "oracle", "descent": "lower bound"}
"""Names of the bound's row."""


@dataclass(frozen=True)
class Bound:
    """The best known routes of some windows, in the reference context, at a price.

    Attributes:
        name: name of its row in tables.
        exact: true: no route is better; false: its return is a lower bound of the best.
        windows: (B, T+1).
        routes: (B, T, L), action codes.
        losses: (B, T), nats.
        compute: (B, T), in [0, 1].
        frontier: rows with `big`, `loss`, `compute` per number of big layers; empty without a frontier.
        shown: a search of the first windows at price 0, or at all prices, for the difficulty of their tokens.
    """

    name: str
    exact: bool
    windows: Tensor
    routes: Tensor
    losses: Tensor
    compute: Tensor
    frontier: list[dict[str, Any]]
    shown: RouteTable | Found

    @property
    def kind(self) -> str:
        """`exact` or `lower bound`."""
        return "exact" if self.exact else "lower bound"

    @property
    def router(self) -> ReplayRouter:
        """A router with these routes, for these windows only; the routes were not searched in the routed context."""
        return ReplayRouter.of(self.windows, self.routes)

    def difficulty(self, model: DuoForCausalLM, tokenizer: PreTrainedTokenizerBase) -> list[TokenRow]:
        """Tokens of the first windows with their difficulty; a lower bound, if this bound is one."""
        shown = self.windows[: len(self.shown.losses)].to(model.device)
        if isinstance(self.shown, RouteTable):
            return token_difficulty(self.shown, shown, tokenizer)
        return found_difficulty(model, self.shown, shown, tokenizer)


def found_difficulty(
    model: DuoForCausalLM, found: Found, tokens: Tensor, tokenizer: PreTrainedTokenizerBase
) -> list[TokenRow]:
    """Difficulties, or lower bounds of them, by an approximate search of tokens (B, T+1) in the reference context."""
    columns = {"best": found.losses, "compute": found.compute, "routes": found.routes}
    return difficulty_rows(tokens, tokenizer, **constant_losses(model, tokens), **columns)


@torch.no_grad()
def constant_losses(model: DuoForCausalLM, tokens: Tensor) -> dict[str, Tensor]:
    """Losses of all-small and all-big of tokens (B, T+1) in the reference context, `small` and `big`, (B, T) nats."""
    memory = remember(model, tokens)

    def losses(action: int) -> Tensor:
        return RoutedPass(model, tokens, context="reference", memory=memory).take_all(action).losses().cpu()

    return {"small": losses(SMALL), "big": losses(BIG)}


def find_bound(
    method: BoundMethod,
    model: DuoForCausalLM,
    windows: Tensor,
    *,
    price: float,
    actions: Sequence[str],
    starts: Sequence[Sequence[int]],
    shown: int = 2,
) -> Bound | None:
    """Search the routes of windows.

    Args:
        method: see the docstring of the module; `none` returns None.
        model: a duo model.
        windows: (B, T+1).
        price: nats per all-big pass.
        actions: names of the allowed actions.
        starts: fixed patterns; the descent starts with the best of them for each token.
        shown: number of windows for `difficulty`.

    Raises:
        ValueError: too many routes, or too much memory for them.
    """
    if method == "none":
        return None
    if method == "exhaustive":
        return _exhaustive(model, windows, price, actions, shown)
    found = descent(model, windows, start=starts, price=price, actions=actions)
    free = descent(model, windows[:shown], start=starts, actions=actions)
    return Bound(ROWS[method], False, windows, found.routes, found.losses, found.compute, [], free)


def _exhaustive(model: DuoForCausalLM, windows: Tensor, price: float, actions: Sequence[str], shown: int) -> Bound:
    table = exhaustive(model, windows, context="reference", actions=actions)
    best = table.best(price)
    found = (table.routes[best].cpu(), table.loss(best).cpu(), table.compute[best].cpu())
    frontier = [{key: row[key] for key in ("big", "loss", "compute")} for row in table.by_budget()]
    few = replace(table, losses=table.losses[:shown].clone())  # so that the whole table can be freed
    return Bound(ROWS["exhaustive"], True, windows, *found, frontier, few)


def can_search(model: DuoForCausalLM, tokens: Tensor) -> str | None:
    """Why a model has no bound, or None. A bound needs the reference context.

    Args:
        model: a duo model.
        tokens: (B, T+1), a few windows.
    """
    try:
        remember(model, tokens.to(model.device))
    except ValueError as error:
        return str(error)
    return None
