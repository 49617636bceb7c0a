"""Approximate oracles, for models whose routes cannot be enumerated: beam search, coordinate descent, random routes.

Each returns routes that exist, so the return it finds is a lower bound of the oracle's (its loss at price 0 an
upper one); how far off it is on duo-tiny stands in docs/oracle.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from duorl.checks import require_positive
from duorl.costs import Tally, action_ids
from duorl.models.modeling import DuoForCausalLM
from duorl.oracle.search import MEMORY_LIMIT, completion_flops, route_compute, states_within, token_by_token
from duorl.routed_pass import RoutedPass, along, pick


@dataclass(frozen=True)
class Found:
    """A route for every token.

    Attributes:
        method: what found them.
        context: `reference` or `routed`, see `exhaustive`.
        routes: (B, T, L) int64, action codes.
        losses: (B, T), nats.
        compute: (B, T), in [0, 1].
        flops: what the search executed; the all-big pass that a token reads is not in it.
        seconds: wall time.
        lower_bound: the oracle's return is at least this one's, and may be higher.
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
"""From a pass at its start, tokens (B, P), to routes (B, P, L) and losses (B, P)."""


def beam(
    model: DuoForCausalLM,
    tokens: Tensor,
    *,
    width: int = 8,
    price: float = 0.0,
    context: Literal["reference", "routed"] = "reference",
    actions: Sequence[str] = ("small", "big"),
) -> Found:
    """Layer by layer keep each token's `width` most promising prefixes.

    A prefix is judged by the loss of what the head would predict from it, plus price * compute so far. With a width of
    A^(L-1) it is the exhaustive search.

    Args:
        model: a duo model.
        tokens: (B, T+1).
        width: prefixes kept per token.
        price: nats per all-big pass.
        context: `reference` or `routed`, see `exhaustive`.
        actions: names of the allowed actions.
    """
    require_positive(width=width)
    codes = action_ids(actions).to(model.device)
    strategy = partial(_beam, codes=codes, width=width, price=price)
    return _search(f"beam {width}", strategy, model, tokens, context)


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
    start: Sequence[int],
    rounds: int = 2,
    price: float = 0.0,
    context: Literal["reference", "routed"] = "reference",
    actions: Sequence[str] = ("small", "big"),
) -> Found:
    """Coordinate descent: change one layer's action at a time where that pays, all other layers as they are.

    Args:
        model: a duo model.
        tokens: (B, T+1).
        start: L action codes from which every token starts: the best fixed pattern, see `fixed_patterns`.
        rounds: sweeps over the layers; it ends early when no token changes.
        price: nats per all-big pass.
        context: `reference` or `routed`, see `exhaustive`.
        actions: names of the allowed actions.

    Raises:
        ValueError: `start` has another length, or an action that is not allowed.
    """
    require_positive(rounds=rounds)
    codes = action_ids(actions).to(model.device)
    if len(start) != model.num_layers or not set(start) <= set(codes.tolist()):
        raise ValueError(f"start must be {model.num_layers} codes out of {codes.tolist()}, not {list(start)}")
    route = torch.tensor(list(start), device=model.device)
    strategy = partial(_descent, codes=codes, start=route, rounds=rounds, price=price)
    return _search(f"descent {rounds}", strategy, model, tokens, context)


def _descent(walk: RoutedPass, *, codes: Tensor, start: Tensor, rounds: int, price: float) -> tuple[Tensor, Tensor]:
    choice = torch.searchsorted(codes, start).expand(*walk.targets.shape, -1).clone()  # (B, P, L), indices into codes
    losses, cost = _complete(walk.fork(), codes[choice], price)
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
    """Losses and costs, both (B, P), of a pass that follows routes (B, P, L) from where it stands."""
    while not walk.done:
        walk.step(routes[..., walk.layer])
    losses = walk.losses()
    return losses, losses + price * walk.compute


def descent_flops(model: DuoForCausalLM, actions: Sequence[str], positions: float, *, rounds: int = 2) -> float:
    """FLOPs of `descent` for one token, at most: every layer big, and no round that ends early.

    Args:
        model: a duo model.
        actions: names of the A allowed actions.
        positions: whose scores attention computes for the token.
        rounds: sweeps over the layers.
    """
    rest = completion_flops(model, actions, positions)
    steps = rest[0] - model.flops.head  # of the pass from which the trials fork
    first = model.flops.attention(0, positions)
    return first + rest[0] + rounds * ((len(actions) - 1) * sum(rest) + steps)


def best_of_random(
    model: DuoForCausalLM,
    tokens: Tensor,
    *,
    count: int = 100,
    generator: torch.Generator,
    price: float = 0.0,
    context: Literal["reference", "routed"] = "reference",
    actions: Sequence[str] = ("small", "big"),
) -> Found:
    """Each token's best of `count` random routes, the same for all tokens (Duo-LLM, Fig. 4a).

    Args:
        model: a duo model.
        tokens: (B, T+1).
        count: routes drawn, uniformly and with replacement.
        generator: of the draws.
        price: nats per all-big pass.
        context: `reference` or `routed`, see `exhaustive`.
        actions: names of the allowed actions.
    """
    require_positive(count=count)
    codes = action_ids(actions)
    drawn = codes[torch.randint(len(codes), (count, model.num_layers), generator=generator)].to(model.device)
    return _search(f"random {count}", partial(_best_of, routes=drawn, price=price), model, tokens, context)


def _best_of(walk: RoutedPass, *, routes: Tensor, price: float) -> tuple[Tensor, Tensor]:
    losses = torch.empty(len(routes), *walk.targets.shape, device=routes.device)
    cost = torch.empty_like(losses)
    for index, done in along(walk, routes):
        losses[index] = done.losses()
        cost[index] = losses[index] + price * done.compute
    best = cost.argmin(0, keepdim=True)
    return routes[best[0]], losses.gather(0, best)[0]


def _search(
    method: str,
    strategy: Strategy,
    model: DuoForCausalLM,
    tokens: Tensor,
    context: Literal["reference", "routed"],
) -> Found:
    """Run a strategy on all tokens: window by window in the reference context, token by token in the routed one."""
    if context not in ("reference", "routed"):
        raise ValueError(f"unknown context {context!r}: an approximate search knows reference and routed")
    tokens, tally, started = tokens.to(model.device), Tally(), time.perf_counter()
    routes = torch.empty(*tokens[:, 1:].shape, model.num_layers, dtype=torch.int64, device=tokens.device)
    losses = torch.empty(routes.shape[:2], device=tokens.device)

    def search(walk: RoutedPass, rows: slice, position: int) -> Tensor:
        columns = slice(position, position + walk.targets.shape[1])
        routes[rows, columns], losses[rows, columns] = strategy(walk)
        return routes[rows, columns]

    with torch.no_grad():
        if context == "reference":
            for row in range(len(tokens)):
                window = tokens[row : row + 1]
                search(RoutedPass(model, window, context="reference", tally=tally), slice(row, row + 1), 0)
        else:
            at_once = states_within(MEMORY_LIMIT, model, len(tokens), losses.shape[1], 1)
            token_by_token(model, tokens, search, at_once=at_once, tally=tally)
    routes, losses = routes.cpu(), losses.cpu()  # waits for an accelerator, so the clock is right
    seconds = time.perf_counter() - started
    return Found(
        method, context, routes, losses, route_compute(model, routes.to(model.device)).cpu(), tally.flops, seconds
    )
