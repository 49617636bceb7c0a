"""Approximate oracles, for models whose routes cannot be enumerated: beam search, coordinate descent, random routes.

Each search returns one route per token. The return of these routes is a lower bound of the oracle's return, and their
loss at price 0 is an upper bound of its loss. docs/explanation/oracle.md has the differences on duo-tiny.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor

from duorl.checks import require_positive
from duorl.costs import Tally, action_ids
from duorl.models.modeling import DuoForCausalLM
from duorl.oracle.search import MEMORY_LIMIT, completion_flops, states_within, token_by_token
from duorl.routed_pass import RoutedPass, along, pick


@dataclass(frozen=True)
class Found:
    """A route for every token.

    Attributes:
        method: name of the search.
        context: `reference` or `routed`, see `exhaustive`.
        routes: (B, T, L) int64, action codes.
        losses: (B, T), nats.
        compute: (B, T), in [0, 1].
        flops: FLOPs of the search, without the all-big pass whose keys and values the tokens read.
        seconds: wall time.
        lower_bound: true: the oracle's return may be higher than that of these routes.
    """

    method: str
    context: Literal["reference", "routed"]
    routes: Tensor
    losses: Tensor
    compute: Tensor
    flops: float
    seconds: float
    lower_bound: bool = True


Strategy = Callable[[RoutedPass], tuple[Tensor, Tensor]]
"""A search: from a pass at its start, tokens (B, P), to routes (B, P, L) and losses (B, P)."""


def beam(
    model: DuoForCausalLM,
    tokens: Tensor,
    *,
    width: int = 8,
    price: float = 0.0,
    context: Literal["reference", "routed"] = "reference",
    actions: Sequence[str] = ("small", "big"),
    memory_limit: int = MEMORY_LIMIT,
) -> Found:
    """Beam search: in each layer, keep the best `width` prefixes (routes so far) of each token.

    The score of a prefix is the loss of the prediction that the head makes from it, plus price * compute so far. With a
    width of A^(L-1) this is the exhaustive search.

    Args:
        model: a duo model.
        tokens: (B, T+1).
        width: number of prefixes kept per token.
        price: nats per all-big pass.
        context: `reference` or `routed`, see `exhaustive`.
        actions: names of the allowed actions.
        memory_limit: bytes for everything that the search allocates.
    """
    require_positive(width=width)
    codes = action_ids(actions).to(model.device)
    strategy = partial(_beam, codes=codes, width=width, price=price)
    return _search(f"beam {width}", strategy, model, tokens, context, memory_limit, width * len(codes))


def _beam(walk: RoutedPass, *, codes: Tensor, width: int, price: float) -> tuple[Tensor, Tensor]:
    shape = walk.targets.shape
    routes = torch.empty(1, *shape, 0, dtype=torch.int64, device=codes.device)  # (K, B, P, l)

    def promising(stream: Tensor, compute: Tensor) -> Tensor:
        cost = (walk.losses(stream) + price * compute).view(-1, *shape)
        return cost.topk(width, dim=0, largest=False).indices

    while not walk.done:
        count = len(routes)
        newest = codes.repeat(count).view(-1, 1, 1, 1).expand(-1, *shape, 1)
        routes = torch.cat([routes.repeat_interleave(len(codes), 0), newest], dim=-1)
        if len(routes) <= width or walk.layer == walk.depth - 1:
            walk.branch(codes.tolist())
            continue
        kept = walk.branch(codes.tolist(), keep=promising)
        assert kept is not None
        routes = pick(routes.flatten(0, 1), kept).unflatten(0, (width, -1))
    losses = walk.losses().view(-1, *shape)
    best_of_all = (losses + price * walk.compute.view_as(losses)).argmin(0, keepdim=True)
    return pick(routes.flatten(0, 1), best_of_all), losses.gather(0, best_of_all)[0]


def descent(
    model: DuoForCausalLM,
    tokens: Tensor,
    *,
    start: Sequence[int] | Sequence[Sequence[int]],
    rounds: int = 2,
    price: float = 0.0,
    context: Literal["reference", "routed"] = "reference",
    actions: Sequence[str] = ("small", "big"),
    memory_limit: int = MEMORY_LIMIT,
) -> Found:
    """Coordinate descent: change one layer's action at a time, if this lowers loss + price * compute.

    Args:
        model: a duo model.
        tokens: (B, T+1).
        start: L action codes with which every token starts, for example the best fixed pattern (`fixed_patterns`); or
            several of these, and every token starts with its best one.
        rounds: number of sweeps over the layers; the search ends early if no token changes.
        price: nats per all-big pass.
        context: `reference` or `routed`, see `exhaustive`.
        actions: names of the allowed actions.
        memory_limit: bytes for everything that the search allocates.

    Raises:
        ValueError: `start` has another length, or an action that is not allowed; or the memory limit is too small.
    """
    require_positive(rounds=rounds)
    codes = action_ids(actions).to(model.device)
    single = all(isinstance(code, int) for code in start)
    starts = cast(Sequence[Sequence[int]], [start] if single else start)
    for route in starts:
        if len(route) != model.num_layers or not set(route) <= set(codes.tolist()):
            raise ValueError(f"start must be {model.num_layers} codes out of {codes.tolist()}, not {list(route)}")
    routes = torch.tensor([list(route) for route in starts], device=model.device)
    strategy = partial(_descent, codes=codes, starts=routes, rounds=rounds, price=price)
    return _search(f"descent {rounds}", strategy, model, tokens, context, memory_limit)


def _descent(walk: RoutedPass, *, codes: Tensor, starts: Tensor, rounds: int, price: float) -> tuple[Tensor, Tensor]:
    best, losses, cost = _best_among(walk, starts, price)
    choice = torch.searchsorted(codes, starts)[best]  # (B, P, L), indices into codes
    for _ in range(rounds):
        before, taken = choice.clone(), walk.fork()
        while not taken.done:
            for offset in range(1, len(codes)):
                trial = choice.clone()
                trial[..., taken.layer] = (before[..., taken.layer] + offset) % len(codes)
                trial_losses, trial_cost = _complete(taken.fork(), codes[trial], price)
                better = trial_cost < cost
                choice = torch.where(better[..., None], trial, choice)
                losses, cost = torch.where(better, trial_losses, losses), torch.where(better, trial_cost, cost)
            taken.step(codes[choice[..., taken.layer]])
        if torch.equal(before, choice):
            break
    return codes[choice], losses


def _complete(walk: RoutedPass, routes: Tensor, price: float) -> tuple[Tensor, Tensor]:
    """Losses and costs, both (B, P), of a pass that follows routes (B, P, L) from its current layer."""
    losses = walk.follow(routes).losses()
    return losses, losses + price * walk.compute


def descent_flops(
    model: DuoForCausalLM, actions: Sequence[str], positions: float, *, rounds: int = 2, starts: int = 1
) -> float:
    """Maximum FLOPs of `descent` for one token: every layer is big, and no round ends early.

    Args:
        model: a duo model.
        actions: names of the A allowed actions.
        positions: number of positions that the token attends to.
        rounds: number of sweeps over the layers.
        starts: number of routes of which every token starts with its best.
    """
    rest = completion_flops(model, actions, positions)
    steps = rest[0] - model.flops.head  # of the pass that the trials start from
    first = model.flops.attention(0, positions)
    return starts * (first + rest[0]) + rounds * ((len(actions) - 1) * sum(rest) + steps)


def best_of_random(
    model: DuoForCausalLM,
    tokens: Tensor,
    *,
    count: int = 100,
    generator: torch.Generator,
    price: float = 0.0,
    context: Literal["reference", "routed"] = "reference",
    actions: Sequence[str] = ("small", "big"),
    memory_limit: int = MEMORY_LIMIT,
) -> Found:
    """Take the best of `count` random routes for each token; all tokens try the same routes (Duo-LLM, Fig. 4a).

    Args:
        model: a duo model.
        tokens: (B, T+1).
        count: number of routes, drawn uniformly and with replacement.
        generator: draws the routes.
        price: nats per all-big pass.
        context: `reference` or `routed`, see `exhaustive`.
        actions: names of the allowed actions.
        memory_limit: bytes for everything that the search allocates.
    """
    require_positive(count=count)
    codes = action_ids(actions)
    drawn = codes[torch.randint(len(codes), (count, model.num_layers), generator=generator)].to(model.device)
    strategy = partial(_best_of, routes=drawn, price=price)
    return _search(f"random {count}", strategy, model, tokens, context, memory_limit)


def _best_of(walk: RoutedPass, *, routes: Tensor, price: float) -> tuple[Tensor, Tensor]:
    best, losses, _ = _best_among(walk, routes, price)
    return routes[best], losses


def _best_among(walk: RoutedPass, routes: Tensor, price: float) -> tuple[Tensor, Tensor, Tensor]:
    """The best of some routes (R, L) for each token: its index, loss and cost, all (B, P)."""
    losses = torch.empty(len(routes), *walk.targets.shape, device=routes.device)
    cost = torch.empty_like(losses)
    for index, done in along(walk, routes):
        losses[index] = done.losses()
        cost[index] = losses[index] + price * done.compute
    best = cost.argmin(0, keepdim=True)
    return best[0], losses.gather(0, best)[0], cost.gather(0, best)[0]


def _search(
    method: str,
    strategy: Strategy,
    model: DuoForCausalLM,
    tokens: Tensor,
    context: Literal["reference", "routed"],
    memory_limit: int = MEMORY_LIMIT,
    branches: int = 1,
) -> Found:
    """Run a search on all tokens: some windows at once in the reference context, token by token in the routed one."""
    if context not in ("reference", "routed"):
        raise ValueError(f"unknown context {context!r}: an approximate search needs reference or routed")
    tokens, tally, started = tokens.to(model.device), Tally(), time.perf_counter()
    routes = torch.empty(*tokens[:, 1:].shape, model.num_layers, dtype=torch.int64, device=tokens.device)
    losses = torch.empty(routes.shape[:2], device=tokens.device)

    def search(walk: RoutedPass, rows: slice, position: int) -> Tensor:
        columns = slice(position, position + walk.targets.shape[1])
        routes[rows, columns], losses[rows, columns] = strategy(walk)
        return routes[rows, columns]

    at_once = states_within(memory_limit, model, len(tokens), losses.shape[1], 1)
    with torch.no_grad():
        if context == "reference":
            size = max(1, at_once // (branches * losses.shape[1]))
            for row in range(0, len(tokens), size):
                rows = slice(row, row + size)
                search(RoutedPass(model, tokens[rows], context="reference", tally=tally), rows, 0)
        else:
            token_by_token(model, tokens, search, at_once=at_once, tally=tally)
    routes, losses = routes.cpu(), losses.cpu()  # waits for an accelerator, so that the time is right
    seconds = time.perf_counter() - started
    return Found(
        method, context, routes, losses, model.route_compute(routes.to(model.device)).cpu(), tally.flops, seconds
    )
