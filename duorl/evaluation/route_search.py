"""The search of `duorl oracle`: the routes of held-out tokens, exhaustive or approximate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from duorl.costs import action_ids
from duorl.evaluation.bound import can_search, constant_losses
from duorl.evaluation.choice import duration
from duorl.evaluation.columns import Columns
from duorl.evaluation.difficulty import TokenRow, difficulty_rows, token_difficulty
from duorl.models.modeling import DuoForCausalLM
from duorl.oracle import (
    RouteTable,
    SearchContext,
    beam,
    best_of_random,
    count_routes,
    descent,
    descent_flops,
    exhaustive,
    tree_flops,
)
from duorl.oracle.patterns import STARTS, Route, pattern_count, patterns_flops, search_patterns, spread
from duorl.oracle.search import MEMORY_LIMIT, all_routes, states_within

SearchMethod = Literal["auto", "exhaustive", "descent", "beam"]
_RANDOM, _BEAM = 100, 8
_START_WINDOWS = 2  # to choose the patterns with which a descent starts; it changes most of their actions


@dataclass(frozen=True)
class RouteSearchOptions:
    """Options of the search.

    Args:
        method: `exhaustive`, coordinate `descent` or `beam` search; `auto` is exhaustive if this fits into the
            memory limit, and descent otherwise.
        context: `reference`, `routed`, or (only for an exhaustive search) `uniform`.
        actions: names of the allowed actions.
        price: nats per all-big pass.
        memory_limit: bytes.
        seed: seed of the random routes in the comparison.
    """

    method: SearchMethod = "auto"
    context: SearchContext = "reference"
    actions: tuple[str, ...] = ("small", "big")
    price: float = 0.0
    memory_limit: int = MEMORY_LIMIT
    seed: int = 0


@dataclass(frozen=True)
class RouteSearch:
    """The result of a search.

    Attributes:
        method: `exhaustive`, `descent` or `beam`.
        exact: true: no route is better; false: its return is a lower bound of the oracle's.
        rows: rows per number of big layers, see `RouteTable.by_budget`; empty if the search is for one price only.
        title: title of a table of the rows: context and tokens.
        summary: a sentence with the means over all tokens.
        numbers: content of `oracle.json`, without settings.
        difficulty: one row per token; empty if small or big is not allowed, or if the context has no difficulty.
    """

    method: str
    exact: bool
    rows: list[dict[str, float]]
    title: str
    summary: str
    numbers: dict[str, Any]
    difficulty: list[TokenRow]


@dataclass(frozen=True)
class RouteSearchPlan:
    """A planned search.

    Attributes:
        method: `exhaustive`, `descent` or `beam`.
        flops: approximate FLOPs of the search and of the random routes in the comparison.
    """

    method: str
    flops: float

    def text(self, flops_per_second: float) -> str:
        """A sentence for the terminal."""
        bound = "exact" if self.method == "exhaustive" else "a lower bound of the oracle"
        return f"search: {self.method}, {bound}, about {duration(self.flops / flops_per_second)} on this machine."


def plan_route_search(model: DuoForCausalLM, tokens: Tensor, options: RouteSearchOptions) -> RouteSearchPlan:
    """Plan the search of tokens (B, T+1): decides `auto`, before the search starts.

    Raises:
        ValueError: the method is unknown or impossible: too many routes, too much memory, or another context; or the
            model has no such context.
    """
    if options.context != "uniform" and (missing := can_search(model, tokens[:1])):
        raise ValueError(missing)
    method, (count, positions) = _method(model, tokens, options), tokens[:, 1:].shape
    walk = partial(tree_flops, model, options.actions, positions)
    if method == "exhaustive":
        per_token = walk()
    elif method == "beam":
        per_token = walk(routes=_BEAM * len(options.actions)) + walk(routes=_RANDOM)
    else:
        per_token = descent_flops(model, options.actions, positions, starts=STARTS + 1) + walk(routes=_RANDOM)
        start = patterns_flops(model, options.actions, positions, "greedy")
        per_token += start * _START_WINDOWS / count
    return RouteSearchPlan(method, per_token * count * positions)


def _method(model: DuoForCausalLM, tokens: Tensor, options: RouteSearchOptions) -> str:
    if options.method not in get_args(SearchMethod):
        raise ValueError(f"unknown method {options.method!r}: choose from {', '.join(get_args(SearchMethod))}")
    action_ids(options.actions)
    if options.method in ("descent", "beam"):
        if options.context == "uniform":
            raise ValueError(f"{options.method} knows the reference and the routed context: give one of them")
        return options.method
    try:
        routes = count_routes(model.num_layers, options.actions)
        states_within(options.memory_limit, model, len(tokens), tokens.shape[1] - 1, routes)
    except ValueError as error:
        if options.method == "exhaustive" or options.context == "uniform":
            raise ValueError(f"an exhaustive search is impossible here, give --method descent: {error}") from error
        return "descent"
    return "exhaustive"


def choose_starts(
    model: DuoForCausalLM, text: Tensor, options: RouteSearchOptions, tried: Callable[[int], None] = lambda count: None
) -> list[Route]:
    """The fixed patterns with which a descent starts, chosen on the first windows of the text; a bound may use labels.

    Args:
        model: a duo model.
        text: (W, T+1), all windows of the text; so the patterns do not depend on how many of them are searched.
        options: see `RouteSearchOptions`.
        tried: called with the number of patterns so far, of at most `starts_count`.
    """
    windows, actions, price = text[:_START_WINDOWS], options.actions, options.price
    found = search_patterns(model, windows, actions=actions, method="greedy", price=price, tried=tried)
    spent = model.flops.compute.tolist()

    def cost(route: Route) -> float:
        return found[route] + price * sum(spent[layer][code] for layer, code in enumerate(route))

    return [min(found, key=cost), *spread(found)]


def starts_count(model: DuoForCausalLM, options: RouteSearchOptions) -> int:
    """Maximum number of patterns that `choose_starts` tries."""
    return pattern_count(model.num_layers, options.actions, "greedy")


def search_windows(
    model: DuoForCausalLM,
    tokens: Tensor,
    options: RouteSearchOptions,
    method: str,
    starts: Sequence[Sequence[int]] = (),
) -> Columns:
    """Search the route of every token of some windows, whatever other windows there are.

    Args:
        model: a duo model.
        tokens: (B, T+1).
        options: see `RouteSearchOptions`.
        method: that of the plan.
        starts: for a descent, see `choose_starts`.

    Returns:
        Of an exhaustive search, `losses` (B, T, A^L) nats, and in the routed context `committed` (B, T), see
        `RouteTable`. Of the others, `routes` (B, T, L), `losses` and `compute` (B, T), see `Found`; `random`, the
        losses (B, T) of the best of 100 random routes; and for the difficulty `small` and `big`, those of the two
        constant routes.

    Raises:
        ValueError: see `plan_route_search`.
    """
    names = ("price", "actions", "context", "memory_limit")
    more: dict[str, Any] = {name: getattr(options, name) for name in names}
    if method == "exhaustive":
        table = exhaustive(model, tokens, **more)
        found = {"losses": table.losses, "committed": table.committed}
        return {name: values.cpu() for name, values in found.items() if values is not None}
    best = (
        descent(model, tokens, start=starts, **more)
        if method == "descent"
        else beam(model, tokens, width=_BEAM, **more)
    )
    lucky = best_of_random(model, tokens, count=_RANDOM, generator=_generator(options), **more)
    columns = {"routes": best.routes, "losses": best.losses, "compute": best.compute, "random": lucky.losses}
    if _has_difficulty(options) and options.context == "reference":
        columns |= constant_losses(model, tokens.to(model.device))
    return columns


def summarize(
    model: DuoForCausalLM,
    tokens: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    options: RouteSearchOptions,
    method: str,
    found: Columns,
) -> RouteSearch:
    """Compare the routes of all windows with the best of 100 random ones.

    Args:
        model: a duo model.
        tokens: (B, T+1).
        tokenizer: gives their text.
        options: see `RouteSearchOptions`.
        method: that of the plan.
        found: what `search_windows` found in these windows.
    """
    if method == "exhaustive":
        return _exact(model, tokens, tokenizer, options, found)
    difficulty = []
    if "small" in found:
        columns = {name: found[name] for name in ("small", "big", "compute", "routes")}
        difficulty = difficulty_rows(tokens, tokenizer, best=found["losses"], **columns)
    means = _means(found["losses"], found["compute"], found["random"])
    return _described(method, tokens, options, [], means, difficulty)


def _exact(
    model: DuoForCausalLM,
    tokens: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    options: RouteSearchOptions,
    found: Columns,
) -> RouteSearch:
    routes, price = all_routes(model.num_layers, options.actions), options.price
    spent = model.route_compute(routes.to(model.device)).cpu()
    table = RouteTable(routes, found["losses"], spent, options.context, committed=found.get("committed"))
    # A committed context belongs to one price; in it, routes of other budgets have no meaning.
    rows = table.by_budget() if table.committed is None else []
    lucky = table.best_of_random(_RANDOM, generator=_generator(options), price=price)
    best = table.best(price)
    difficulty = token_difficulty(table, tokens, tokenizer, price=price) if _has_difficulty(options) else []
    means = _means(table.loss(best), table.compute[best], table.loss(lucky))
    return _described("exhaustive", tokens, options, rows, means, difficulty)


def _generator(options: RouteSearchOptions) -> torch.Generator:
    """Draws the random routes, the same ones for all windows."""
    return torch.Generator().manual_seed(options.seed)


def _has_difficulty(options: RouteSearchOptions) -> bool:
    return {"small", "big"} <= set(options.actions)


def _means(*values: Tensor) -> list[float]:
    return [value.mean().item() for value in values]


def _described(
    method: str,
    tokens: Tensor,
    options: RouteSearchOptions,
    rows: list[dict[str, float]],
    means: Sequence[float],
    difficulty: list[TokenRow],
) -> RouteSearch:
    loss, compute, random_loss = means
    exact = method == "exhaustive"
    key = "oracle" if exact else "lower_bound"
    name = "oracle" if exact else method
    remark = "" if exact else f"\n{method} is a lower bound of the oracle's return, which may be higher"
    return RouteSearch(
        method=method,
        exact=exact,
        rows=rows,
        title=f"{options.context} context, {tokens[:, 1:].numel():,} held-out tokens",
        summary=(
            f"per token, at price {options.price:g}: {name} {loss:.4f} at compute {compute:.3f}, "
            f"best of {_RANDOM} random {random_loss:.4f}{remark}"
        ),
        numbers={
            "method": method,
            "bound": "exact" if exact else "lower bound",
            "rows": rows,
            key: loss,
            f"{key}_compute": compute,
            f"best_of_{_RANDOM}_random": random_loss,
        },
        difficulty=difficulty,
    )
