"""The search of `duorl oracle`: the routes of held-out tokens, exhaustive or approximate."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from duorl.costs import action_ids
from duorl.evaluation.bound import found_difficulty
from duorl.evaluation.choice import duration
from duorl.evaluation.difficulty import TokenRow, token_difficulty
from duorl.models.modeling import DuoForCausalLM
from duorl.oracle import (
    Found,
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
from duorl.oracle.patterns import STARTS, Route, patterns_flops, search_patterns, spread
from duorl.oracle.search import MEMORY_LIMIT, states_within

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
        return f"search: {self.method}, {bound}, about {duration(self.flops / flops_per_second)}."


def plan_route_search(model: DuoForCausalLM, tokens: Tensor, options: RouteSearchOptions) -> RouteSearchPlan:
    """Plan the search of tokens (B, T+1): decides `auto`, before the search starts.

    Raises:
        ValueError: the method is unknown or impossible: too many routes, too much memory, or another context.
    """
    method, (count, positions) = _method(model, tokens, options), tokens[:, 1:].shape
    walk = partial(tree_flops, model, options.actions, positions)
    if method == "exhaustive":
        per_token = walk()
    elif method == "beam":
        per_token = walk(routes=_BEAM * len(options.actions)) + walk(routes=_RANDOM)
    else:
        per_token = descent_flops(model, options.actions, positions, starts=STARTS + 1) + walk(routes=_RANDOM)
        start = patterns_flops(model, options.actions, positions, "greedy")
        per_token += start * min(1.0, _START_WINDOWS / count)
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


def search_routes(
    model: DuoForCausalLM, tokens: Tensor, tokenizer: PreTrainedTokenizerBase, options: RouteSearchOptions
) -> RouteSearch:
    """Search the route of every token, and compare it with the best of 100 random routes.

    Args:
        model: a duo model.
        tokens: (B, T+1).
        tokenizer: gives their text.
        options: see `RouteSearchOptions`.

    Raises:
        ValueError: see `plan_route_search`.
    """
    method = _method(model, tokens, options)
    if method == "exhaustive":
        return _exhaustive(model, tokens, tokenizer, options)
    return _approximate(method, model, tokens, tokenizer, options)


def _exhaustive(
    model: DuoForCausalLM, tokens: Tensor, tokenizer: PreTrainedTokenizerBase, options: RouteSearchOptions
) -> RouteSearch:
    table = exhaustive(
        model,
        tokens,
        context=options.context,
        actions=options.actions,
        price=options.price,
        memory_limit=options.memory_limit,
    )
    # A committed context belongs to one price; in it, routes of other budgets have no meaning.
    rows = table.by_budget() if table.committed is None else []
    generator = torch.Generator().manual_seed(options.seed)
    lucky = table.best_of_random(_RANDOM, generator=generator, price=options.price)
    best = table.best(options.price)
    loss, random_loss = (table.loss(index).mean().item() for index in (best, lucky))
    named = {"small", "big"} <= set(options.actions)
    difficulty = token_difficulty(table, tokens, tokenizer, price=options.price) if named else []
    spent = table.compute[best].mean().item()
    return _described("exhaustive", table, tokens, options, rows, (loss, spent, random_loss), difficulty)


def _approximate(
    method: str, model: DuoForCausalLM, tokens: Tensor, tokenizer: PreTrainedTokenizerBase, options: RouteSearchOptions
) -> RouteSearch:
    names = ("price", "actions", "context", "memory_limit")
    more: dict[str, Any] = {name: getattr(options, name) for name in names}
    if method == "descent":
        found = descent(model, tokens, start=_starts(model, tokens, options), **more)
    else:
        found = beam(model, tokens, width=_BEAM, **more)
    generator = torch.Generator().manual_seed(options.seed)
    lucky = best_of_random(model, tokens, count=_RANDOM, generator=generator, **more)
    named = {"small", "big"} <= set(options.actions) and options.context == "reference"
    difficulty = found_difficulty(model, found, tokens.to(model.device), tokenizer) if named else []
    means = tuple(value.mean().item() for value in (found.losses, found.compute, lucky.losses))
    return _described(method, found, tokens, options, [], cast(tuple[float, float, float], means), difficulty)


def _starts(model: DuoForCausalLM, tokens: Tensor, options: RouteSearchOptions) -> list[Route]:
    """Good fixed patterns, chosen on the first searched windows; a bound may use labels."""
    tried = search_patterns(
        model, tokens[:_START_WINDOWS], actions=options.actions, method="greedy", price=options.price
    )
    spent = model.flops.compute.tolist()

    def cost(route: Route) -> float:
        return tried[route] + options.price * sum(spent[layer][code] for layer, code in enumerate(route))

    return [min(tried, key=cost), *spread(tried)]


def _described(
    method: str,
    found: RouteTable | Found,
    tokens: Tensor,
    options: RouteSearchOptions,
    rows: list[dict[str, float]],
    means: tuple[float, float, float],
    difficulty: list[TokenRow],
) -> RouteSearch:
    loss, compute, random_loss = means
    exact = isinstance(found, RouteTable)
    key = "oracle" if exact else "lower_bound"
    name = "oracle" if exact else method
    remark = "" if exact else f"\n{method} is a lower bound of the oracle's return, which may be higher"
    return RouteSearch(
        method=method,
        exact=exact,
        rows=rows,
        title=f"{found.context} context, {tokens[:, 1:].numel():,} held-out tokens",
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
