"""Labels: what each action would have been worth, for learners that are taught and do not explore.

In the reference context some routes are walked, and at each of their prefixes every action has a value: what its
completions are worth.

*Searched*, where all routes can be enumerated:

    Q(prefix, a) = T * log mean over completions of exp(-(loss + price * compute) / T),

with T the temperature in nats. T -> 0 is the best completion, which only the oracle finds; a high T is the mean
completion, of a router that knows nothing more. softmax(Q / T) is the conditional P(a | prefix) of the distribution
over routes proportional to exp(-(loss + price * compute) / T), from which the walked routes are drawn.

*By deviations*, at any depth: every token's route is drawn at random, and an action's value is that of taking it in
one layer with the rest of the route as it is: L (A - 1) completions of shared prefixes in place of A^L.
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

_MOST_SEARCHED = 1024  # routes; more cost more than they teach


@dataclass(frozen=True)
class Decisions:
    """What was seen along N walked routes, and what each action was worth there.

    Attributes:
        hidden: (L, N, d), what the layers' FFNs would read.
        compute: (L, N), spent before the decision.
        inputs: (L, N, C), the router's further inputs, the price apart; None where there are none.
        price: (N,), nats per all-big pass.
        values: (L, N, A), nats, in the order of the actions' codes.
    """

    hidden: Tensor
    compute: Tensor
    inputs: Tensor | None
    price: Tensor
    values: Tensor


def searched(model: DuoForCausalLM, tokens: Tensor, actions: Sequence[str]) -> RouteTable | None:
    """All routes of tokens (B, T+1) in the reference context; None where they are too many."""
    return exhaustive(model, tokens, context="reference", actions=actions) if searchable(model, actions) else None


def searchable(model: DuoForCausalLM, actions: Sequence[str]) -> bool:
    """Whether labels come from all routes."""
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
    """Walk routes of some text, and value the actions beside them.

    Args:
        model: a frozen duo model.
        tokens: (B, T+1).
        prices: P of them, nats per all-big pass.
        actions: names of the allowed actions.
        temperature: nats; 0 for the oracle's own routes.
        generator: of the drawn routes.
        inputs: the router's further inputs, which are kept; none unless given.
        table: of an earlier search of the tokens, which no price changes.

    Returns:
        Where all routes are searched, N = P * B * T routes' decisions, the token varying fastest; by deviations N =
        B * T, each token at one of the prices.
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
    """Columns of parts, one after another along the routes; None where a part has nothing."""
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
    """Walk a random route of every token, and try every deviation from it, which no price changes.

    Returns:
        As `walked`, and the deviations' losses in nats and compute, both (L, N, A).
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
    """What every token's loss and compute become if it takes another action in one layer, all else as it is.

    Args:
        walk: at its start; it is used up.
        routes: (B, P, L), action codes.
        actions: the A codes.

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
    """Q(prefix, a) at every prefix of each token's route, see the module's docstring.

    Args:
        table: of an exhaustive search, R = A^L routes in counting order.
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
    # Near 1 exp and log lose the digits that a high temperature multiplies up.
    above = torch.expm1((values - greatest) / temperature).mean(-1)
    return greatest[..., 0] + temperature * torch.log1p(above)


def draw_routes(table: RouteTable, price: float, temperature: float, generator: torch.Generator) -> Tensor:
    """A route per token, P proportional to exp(-(loss + price * compute) / T), the best at T = 0: (B, T) indices."""
    if temperature == 0:
        return table.best(price)
    chances = (-(table.losses + price * table.compute) / temperature).softmax(-1)
    drawn = torch.multinomial(chances.flatten(0, 1).cpu(), 1, generator=generator)
    return drawn.view(chances.shape[:2]).to(table.routes.device)


def walked(
    model: DuoForCausalLM, tokens: Tensor, memory: Memory, routes: Tensor, inputs: Inputs | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states (L, N, d), compute spent (L, N) and a router's listed inputs (L, N, C) along routes (B, T, L)."""
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
