"""Exhaustive search: all A^L routes of every token, each shared prefix computed once.

At layer l there are A^l states per token. Each is computed once, instead of A^L full passes. The search is breadth
first while the states fit into the memory limit, then depth first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, cast, get_args

import torch
from torch import Tensor

from duorl.costs import Tally, action_ids
from duorl.models.families import inner_size
from duorl.models.footprint import Batch, score_bytes
from duorl.models.modeling import DuoForCausalLM
from duorl.oracle.table import RouteTable, SearchContext, cheapest
from duorl.routed_pass import RoutedPass, along, head_rows, remember

if TYPE_CHECKING:
    from duorl.models.config import DuoConfig

_STATES_AT_ONCE = 4096  # maximum of token states in one step; more do not run faster
MOST_ROUTES = 2**16
MEMORY_LIMIT = 2**32
"""Default memory limit of a search, in bytes."""
_FLOAT = 4  # bytes


def all_routes(layers: int, actions: Sequence[str]) -> Tensor:
    """All routes in counting order, the last layer's action varying fastest: (A^L, L) int64.

    Raises:
        ValueError: unknown action, or more routes than can be searched.
    """
    count_routes(layers, actions)
    return _in_counting_order(layers, action_ids(actions).tolist())


def _in_counting_order(layers: int, actions: Sequence[int]) -> Tensor:
    return torch.tensor(list(product(actions, repeat=layers)), dtype=torch.int64)


def count_routes(layers: int, actions: Sequence[str]) -> int:
    """A^L, the routes of an exhaustive search.

    Raises:
        ValueError: unknown action, or more routes than can be searched.
    """
    routes = len(action_ids(actions)) ** layers
    if routes > MOST_ROUTES:
        raise ValueError(f"{len(actions)} actions in {layers} layers make {routes:.1e} routes, too many to enumerate")
    return routes


def tree_flops(model: DuoForCausalLM, actions: Sequence[str], positions: float, *, routes: int | None = None) -> float:
    """FLOPs of one token on all routes, in closed form: sum_l A^l (attention_l + sum_a ffn_la) + A^L head.

    Args:
        model: a duo model.
        actions: names of the A allowed actions.
        positions: number of positions that the token attends to.
        routes: number of routes, R; by default all. There are at most R states in a layer. Every choice of R routes
            needs at most these FLOPs, if its networks have the mean cost of the A actions.
    """
    flops, codes = model.flops, action_ids(actions)
    count, total = len(codes), 0.0
    most = count**model.num_layers if routes is None else min(routes, count**model.num_layers)
    for layer in range(model.num_layers):
        attended, decided = min(count**layer, most), min(count ** (layer + 1), most)
        total += attended * flops.attention(layer, positions)
        total += decided * flops.ffns[layer, codes].sum().item() / count
    return total + most * flops.head


def completion_flops(model: DuoForCausalLM, actions: Sequence[str], positions: float) -> list[float]:
    """Maximum FLOPs to complete one token's pass from each layer on: every layer takes the dearest action.

    Args:
        model: a duo model.
        actions: names of the allowed actions.
        positions: number of positions that the token attends to.
    """
    flops, depth = model.flops, model.num_layers
    networks = flops.ffns[:, action_ids(actions).tolist()].max(1).values.tolist()
    attention = [flops.attention(layer, positions) for layer in range(depth)]
    return [sum(networks[layer:]) + sum(attention[layer + 1 :]) + flops.head for layer in range(depth)]


@torch.no_grad()
def exhaustive(
    model: DuoForCausalLM,
    tokens: Tensor,
    *,
    context: SearchContext = "reference",
    actions: Sequence[str] = ("small", "big"),
    price: float = 0.0,
    allowed: Tensor | None = None,
    memory_limit: int = MEMORY_LIMIT,
) -> RouteTable:
    """Search all A^L routes of every token.

    The context says which keys and values a token reads from the tokens before it:

    - `reference`: those of an all-big pass. Tokens do not depend on each other, so the result is each token's optimum,
      and all tokens of a window are searched in parallel. Cost per token: `tree_flops` over T positions.
    - `uniform`: those of the same route for every token, as when a fixed pattern is deployed. The best route of a token
      then assumes that all tokens before it took this route too. Cost: as in `reference`.
    - `routed`: those of the best routes (at `price`, among `allowed`) of the tokens before it, as in deployment. These
      routes are searched first and then committed: later tokens read their keys and values. Windows are searched in
      parallel, the tokens of a window one after another, so with few windows the search is slow. The choice is greedy,
      token by token, so it may not be the best for the whole window. Cost: `tree_flops` over the positions up to the
      token, and a pass along the committed route.

    Args:
        model: a duo model.
        tokens: (B, T+1).
        context: see above.
        actions: names of the allowed actions.
        price: nats per all-big pass, for the choice of the committed routes in the `routed` context.
        allowed: (R,) or (T, R) bool, the routes (`all_routes`) that the `routed` context may commit; by default all.
        memory_limit: bytes for the result and for everything else that the search allocates.

    Returns:
        A table of R = A^L routes in counting order, the last layer's action varying fastest.

    Raises:
        ValueError: unknown context or action, too many routes, or a memory limit that is too small.
    """
    if context not in get_args(SearchContext):
        raise ValueError(f"unknown context {context!r}: choose from {', '.join(get_args(SearchContext))}")
    tokens = tokens.to(model.device)
    routes = all_routes(model.num_layers, actions).to(tokens.device)
    count, length = tokens[:, 1:].shape
    at_once = states_within(memory_limit, model, count, length, len(routes))
    losses = torch.empty(count, length, len(routes), device=tokens.device)
    compute, codes, tally = model.route_compute(routes), action_ids(actions).tolist(), Tally()
    if context != "routed":
        for window, found in zip(tokens.split(1), losses.split(1), strict=True):
            walk = RoutedPass(model, window, context="reference" if context == "reference" else "routed", tally=tally)
            fill(walk, codes, at_once, found)
        return RouteTable(routes, losses, compute, context, tally.flops)

    def cheapest_at(position: int, here: Tensor) -> Tensor:
        among = allowed if allowed is None or allowed.ndim == 1 else allowed[position]
        return cheapest(here + price * compute, among)

    committed = _search_and_commit(model, tokens, routes, codes, losses, cheapest_at, at_once, tally)
    return RouteTable(routes, losses, compute, context, tally.flops, committed)


def _search_and_commit(
    model: DuoForCausalLM,
    tokens: Tensor,
    routes: Tensor,
    codes: list[int],
    losses: Tensor,
    cheapest_at: Callable[[int, Tensor], Tensor],
    at_once: int,
    tally: Tally,
) -> Tensor:
    """Fill in the losses (B, T, R) token by token; returns the committed routes, (B, T) indices."""
    committed = torch.empty_like(tokens[:, 1:])

    def search(walk: RoutedPass, rows: slice, position: int) -> Tensor:
        here = losses[rows, position : position + 1]
        fill(walk, codes, at_once, here)
        best = cheapest_at(position, here)
        committed[rows, position] = best[:, 0]
        return routes[best]

    token_by_token(model, tokens, search, at_once=at_once, tally=tally)
    return committed


def fill(walk: RoutedPass, actions: Sequence[int], at_once: int, losses: Tensor) -> None:
    """Write the losses of all routes that complete a pass, in counting order.

    Args:
        walk: a pass with one branch, at any layer; it cannot be used afterwards.
        actions: action codes.
        at_once: maximum of token states in one step.
        losses: (B, P, A^rest), the result.
    """
    while not walk.done and walk.compute.numel() * len(actions) <= at_once:
        walk.branch(actions)
    leaves = losses.unflatten(-1, (walk.copies, -1))  # (B, P, K, A^rest)
    for index, done in along(walk, _in_counting_order(walk.depth - walk.layer, actions)):
        leaves[..., index] = done.losses().view(done.copies, *done.targets.shape, 1).permute(1, 2, 0, 3)


def token_by_token(
    model: DuoForCausalLM,
    tokens: Tensor,
    search: Callable[[RoutedPass, slice, int], Tensor],
    *,
    at_once: int,
    tally: Tally,
) -> None:
    """Search in the `routed` context: windows in parallel, each token after the committed routes before it.

    Args:
        model: a duo model.
        tokens: (B, T+1).
        search: a function from a pass of some windows' tokens at one position, the windows' rows and the position, to
            the routes (B', 1, L) to commit.
        at_once: maximum of token states in one step.
        tally: counts the FLOPs.
    """
    length, size = tokens.shape[1] - 1, max(1, at_once // (tokens.shape[1] - 1))
    for start in range(0, len(tokens), size):
        rows = slice(start, start + size)
        windows = tokens[rows]
        memory = remember(model, windows)  # allocates it: every position is overwritten before it is read
        for position in range(length):
            here = torch.full((len(windows), 1), position, device=tokens.device)
            reader, writer = (
                replace(memory, positions=here, mode=mode, length=position + 1) for mode in ("read", "commit")
            )
            chosen = search(RoutedPass(model, windows, memory=reader, tally=tally), rows, position)
            walk = RoutedPass(model, windows, memory=writer, tally=tally)
            while walk.layer < model.num_layers - 1:  # no later token reads the output of the last layer
                walk.step(chosen[..., walk.layer])


def states_within(limit: int, model: DuoForCausalLM, count: int, length: int, routes: int) -> int:
    """How many token states fit into a memory limit at the same time: at least those of one window.

    The count includes the table, the stored keys and values, the head's logits and, per state, three vectors for each
    depth of the search and the working tensors of an FFN or an attention.

    Args:
        limit: memory limit in bytes.
        model: a duo model.
        count: windows, B.
        length: tokens per window, T.
        routes: number of routes in the table, R.

    Raises:
        ValueError: the tokens of one window do not fit.
    """
    config = model.config.backbone
    size, layers = model.hidden_size, model.num_layers
    scores = score_bytes(cast("DuoConfig", model.config), Batch(1, length, context="reference"), model.dtype)
    working = max(_FLOAT * 4 * inner_size(config), _FLOAT * 12 * size + scores)
    stored = 2 * layers * model.flops.width  # keys and values of the tokens in one search
    per_state = _FLOAT * (3 * size * (layers + 1) + stored) + working
    table, logits = _FLOAT * count * length * routes, 4 * _FLOAT * config.vocab_size
    rows = head_rows(config.vocab_size, model.device)  # the head takes no more states at once
    fits = max((limit - table - rows * logits) // per_state, min(rows, (limit - table) // (per_state + logits)))
    if fits < length:
        needed = table + length * per_state + min(length, rows) * logits
        raise ValueError(
            f"memory_limit {limit:,} is too small: a table of {count * length:,} tokens and {routes:,} routes, and its "
            f"search, need {needed:,} bytes; search fewer windows at once or raise it"
        )
    return min(fits, max(length, _STATES_AT_ONCE))
