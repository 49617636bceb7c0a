"""Labels: the value of every action, for learners that learn from labels and do not explore.

Labels are made along some routes in the reference context. At each prefix of a route, every action has a value: the
value of the routes that complete it.

*Searched*: if all routes can be enumerated,

    Q(prefix, a) = T * log mean over completions of exp(-(loss + price * compute) / T),

where T is the temperature in nats. For T -> 0, the value is that of the best completion, which only the oracle finds.
For a high T, it is the mean over the completions. The routes are drawn from the distribution proportional to
exp(-(loss + price * compute) / T); softmax(Q / T) is its conditional probability P(a | prefix).

*By deviations*: for any depth, every token gets a random route. The value of an action in a layer is that of the same
route with only this action changed. This needs L (A - 1) completions of shared prefixes in place of A^L.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from duorl.costs import action_ids
from duorl.inputs import Inputs
from duorl.models.attention import Memory
from duorl.oracle import RouteTable, exhaustive
from duorl.routed_pass import RoutedPass, remember

if TYPE_CHECKING:
    from duorl.models import DuoForCausalLM

_MOST_SEARCHED = 1024  # routes; the search of more costs too much for what it adds


@dataclass(frozen=True)
class Decisions:
    """Inputs of a router along N routes, and the value of each action there.

    Attributes:
        hidden: (L, N, d), input of the layers' FFNs.
        compute: (L, N), compute before the decision.
        inputs: (L, N, C), the router's further inputs, without the price; None if there are none.
        price: (N,), nats per all-big pass.
        values: (L, N, A), value of each action in nats, in the order of the action codes.
    """

    hidden: Tensor
    compute: Tensor
    inputs: Tensor | None
    price: Tensor
    values: Tensor


def searched(model: DuoForCausalLM, tokens: Tensor, actions: Sequence[str]) -> RouteTable | None:
    """Search all routes of tokens (B, T+1) in the reference context; None if there are too many."""
    return exhaustive(model, tokens, context="reference", actions=actions) if searchable(model, actions) else None


def searchable(model: DuoForCausalLM, actions: Sequence[str]) -> bool:
    """Whether there are few enough routes to search all of them."""
    return len(actions) ** model.num_layers <= _MOST_SEARCHED


@torch.no_grad()
def label(
    model: DuoForCausalLM,
    tokens: Tensor,
    *,
    prices: Sequence[float],
    actions: Sequence[str],
    temperature: float,
    generator: torch.Generator,
    inputs: Inputs | None = None,
    table: RouteTable | None = None,
) -> Decisions:
    """Make labels along some routes of some text.

    Args:
        model: a frozen duo model.
        tokens: (B, T+1).
        prices: P prices, nats per all-big pass.
        actions: names of the allowed actions.
        temperature: nats; 0 for the routes of the oracle.
        generator: draws the routes.
        inputs: the router's further inputs, to be kept; by default none.
        table: table of an earlier search of these tokens; it does not depend on the price.

    Returns:
        The decisions of N routes. If all routes are searched, N = P * B * T, with the token as the last index. With
        deviations, N = B * T, each token at one of the prices.
    """
    tokens = tokens.to(model.device)
    table = searched(model, tokens, actions) if table is None else table
    if table is None:
        return _deviated(model, tokens, prices, actions, generator, inputs)
    memory = remember(model, tokens)
    parts = []
    for price in prices:
        routes = draw_routes(table, price, temperature, generator)
        values = action_values(table, price, routes, temperature).flatten(0, 1).transpose(0, 1)
        hidden, compute, extra = walked(model, tokens, memory, table.routes[routes], inputs)
        parts.append((hidden, compute, extra, torch.full_like(compute, price), values))
    hidden, compute, extra, each_price, values = _joined(parts)
    return Decisions(hidden, compute, extra, each_price[0], values)


def _joined(parts: Sequence[tuple[Tensor | None, ...]]) -> list:
    """Concatenate the columns of parts along the routes; None if a part has no such column."""
    columns = zip(*parts, strict=True)
    return [None if column[0] is None else torch.cat(column, dim=1) for column in columns]


def _deviated(
    model: DuoForCausalLM,
    tokens: Tensor,
    prices: Sequence[float],
    actions: Sequence[str],
    generator: torch.Generator,
    inputs: Inputs | None,
) -> Decisions:
    count = tokens[:, 1:].numel()
    hidden, compute, extra, losses, spent = walked_randomly(model, tokens, actions, generator, inputs)
    drawn = torch.tensor(prices)[torch.randint(len(prices), (count,), generator=generator)]
    price = drawn.to(tokens.device)
    return Decisions(hidden, compute, extra, price, -(losses + price[None, :, None] * spent))


@torch.no_grad()
def walked_randomly(
    model: DuoForCausalLM,
    tokens: Tensor,
    actions: Sequence[str],
    generator: torch.Generator,
    inputs: Inputs | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """Give every token a random route, and try every deviation from it; the result does not depend on the price.

    Returns:
        The result of `walked`, and losses in nats and compute of the deviations, both (L, N, A).
    """
    codes, shape = action_ids(actions), tokens[:, 1:].shape
    routes = codes[torch.randint(len(codes), (*shape, model.num_layers), generator=generator)].to(tokens.device)
    parts = []
    for window, own in zip(tokens.split(1), routes.split(1), strict=True):
        memory = remember(model, window)
        losses, spent = deviations(RoutedPass(model, window, context="reference", memory=memory), own, codes.tolist())
        parts.append((*walked(model, window, memory, own, inputs), losses.flatten(1, 2), spent.flatten(1, 2)))
    hidden, compute, extra, losses, spent = _joined(parts)
    return hidden, compute, extra, losses, spent


def deviations(walk: RoutedPass, routes: Tensor, actions: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Loss and compute of every token if it takes another action in one layer and keeps the rest of its route.

    Args:
        walk: a pass at its start; it cannot be used afterwards.
        routes: (B, P, L), action codes.
        actions: the A action codes.

    Returns:
        Losses in nats and compute, both (L, B, P, A).
    """
    losses: list[Tensor] = []
    spent: list[Tensor] = []
    while not walk.done:
        layer, found = walk.layer, []
        for action in actions:
            child = walk.fork()
            child.take(action)
            while not child.done:
                child.step(routes[..., child.layer])
            found.append((child.losses(), child.compute))
        for column, parts in zip((losses, spent), zip(*found, strict=True), strict=True):
            column.append(torch.stack(parts, dim=-1))
        walk.step(routes[..., layer])
    return torch.stack(losses), torch.stack(spent)


def action_values(table: RouteTable, price: float, routes: Tensor, temperature: float) -> Tensor:
    """Q(prefix, a) at every prefix of each token's route; see the docstring of the module.

    Args:
        table: table of an exhaustive search, R = A^L routes in counting order.
        price: nats per all-big pass.
        routes: (B, T), indices into `table.routes`.
        temperature: nats; 0 for the best completion.

    Returns:
        Shape (B, T, L, A), nats.
    """
    layers, count = table.routes.shape[1], len(table.routes[:, 0].unique())
    value = -(table.losses + price * table.compute)  # (B, T, R)
    found = []
    for left in range(1, layers + 1):  # from the last layer up
        choices = value.unflatten(-1, (-1, count))  # (B, T, prefixes, A)
        prefix = (routes // count**left)[..., None, None].expand(-1, -1, 1, count)
        found.append(choices.gather(2, prefix))
        value = soft_maximum(choices, temperature)
    return torch.cat(found[::-1], dim=2)


def soft_maximum(values: Tensor, temperature: float) -> Tensor:
    """T * log mean exp(values / T) over the last axis: the maximum at T = 0, the mean at a high T."""
    greatest = values.amax(-1, keepdim=True)
    if temperature == 0:
        return greatest[..., 0]
    # exp and log near 1 lose digits, and a high temperature would multiply this error.
    above = torch.expm1((values - greatest) / temperature).mean(-1)
    return greatest[..., 0] + temperature * torch.log1p(above)


def draw_routes(table: RouteTable, price: float, temperature: float, generator: torch.Generator) -> Tensor:
    """Draw a route per token, P proportional to exp(-(loss + price * compute) / T), best if T = 0: (B, T) indices."""
    if temperature == 0:
        return table.best(price)
    chances = (-(table.losses + price * table.compute) / temperature).softmax(-1)
    drawn = torch.multinomial(chances.flatten(0, 1).cpu(), 1, generator=generator)
    return drawn.view(chances.shape[:2]).to(table.routes.device)


def walked(
    model: DuoForCausalLM, tokens: Tensor, memory: Memory, routes: Tensor, inputs: Inputs | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states (L, N, d), compute so far (L, N) and a router's listed inputs (L, N, C) along routes (B, T, L)."""
    walk = RoutedPass(model, tokens, context="reference", memory=memory)
    hidden, compute, extra = [], [], []
    while not walk.done:
        view = walk.view.by_token()
        hidden.append(view.hidden)
        compute.append(view.compute)
        extra.append(None if inputs is None else inputs.listed(view))
        walk.step(routes[..., walk.layer])
    found = [features for features in extra if features is not None]
    return torch.stack(hidden), torch.stack(compute), torch.stack(found) if found else None
