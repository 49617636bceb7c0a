"""Labels: the value of every action, for learners that learn from labels and do not explore.

Labels are made along some routes in the reference context. At each prefix of a route, every action has a value: the
value of the routes that complete it.

*Searched*: if all routes can be enumerated,

    Q(prefix, a) = T * log mean over completions of exp(-(loss + price * compute) / T),

where T is the temperature in nats. For T -> 0, the value is that of the best completion, which only the oracle finds.
For a high T, it is the mean over the completions. The routes are drawn from the distribution proportional to
exp(-(loss + price * compute) / T); softmax(Q / T) is its conditional probability P(a | prefix).

*By deviations*: for any depth, every token gets the route of a base policy: a random route, one action, a fixed
pattern, or the route of a router. The value of an action in a layer is that of the same route with only this action
changed. This needs L (A - 1) completions of shared prefixes in place of A^L.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from duorl import ranks
from duorl.costs import action_ids
from duorl.inputs import Inputs
from duorl.models.attention import Memory
from duorl.oracle import RouteTable
from duorl.oracle.search import MEMORY_LIMIT, states_within
from duorl.routed_pass import RoutedPass, remember
from duorl.routers import Router

if TYPE_CHECKING:
    from duorl.models import DuoForCausalLM


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


@torch.no_grad()
def label(
    model: DuoForCausalLM,
    tokens: Tensor,
    table: RouteTable,
    *,
    prices: Sequence[float],
    temperature: float,
    generator: torch.Generator,
    inputs: Inputs | None = None,
) -> Decisions:
    """Make labels from a search of all routes, along some of them.

    Args:
        model: a frozen duo model.
        tokens: (B, T+1).
        table: an exhaustive search of these tokens in the reference context; it does not depend on the price.
        prices: P prices, nats per all-big pass.
        temperature: nats; 0 for the routes of the oracle.
        generator: draws the routes.
        inputs: the router's further inputs, to be kept; by default none.

    Returns:
        The decisions of N = P * B * T routes, with the token as the last index.
    """
    tokens = tokens.to(model.device)
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


@dataclass(frozen=True)
class Deviations:
    """Inputs of a router along one route of each of N tokens, and what every deviation from it costs.

    Losses and compute do not depend on the price, so they serve routers for all prices.

    Attributes:
        hidden, compute, inputs, price: see `Decisions`; the price may have had a part in the route.
        losses: (L, N, A), nats, if the token takes an action in a layer and keeps the rest of its route.
        spent: (L, N, A), compute of the same routes.
        routes: (N, L), action codes of the tokens' own routes.
    """

    hidden: Tensor
    compute: Tensor
    inputs: Tensor | None
    price: Tensor
    losses: Tensor
    spent: Tensor
    routes: Tensor

    def values(self, price: Tensor | float) -> Tensor:
        """Value of every deviation in nats, (L, N, A), at a price or at one per token, (N, 1)."""
        return -(self.losses + price * self.spent)

    def decisions(self, price: float | None = None) -> Decisions:
        """All tokens at one price, by default each token at its own."""
        each = self.price if price is None else torch.full_like(self.price, price)
        return Decisions(self.hidden, self.compute, self.inputs, each, self.values(each[:, None]))


@torch.no_grad()
def deviated(
    model: DuoForCausalLM,
    tokens: Tensor,
    prices: Sequence[float],
    actions: Sequence[str],
    *,
    base: Router | None = None,
    generator: torch.Generator,
    inputs: Inputs | None = None,
) -> Deviations:
    """Give every token the route of a base policy, and try every deviation from it, in the reference context.

    Args:
        model: a frozen duo model.
        tokens: (B, T+1).
        prices: nats per all-big pass; each token is at one of them, which a base policy may read.
        actions: names of the allowed actions.
        base: a router that takes only these actions; by default, every token gets a random route.
        generator: draws the random routes and the prices.
        inputs: the router's further inputs, to be kept; by default none.

    Raises:
        ValueError: the base policy takes an action that is not allowed.
    """
    codes, tokens = action_ids(actions), tokens.to(model.device)
    shape = tokens[:, 1:].shape
    routes = codes[torch.randint(len(codes), (*shape, model.num_layers), generator=generator)].to(tokens.device)
    price = torch.tensor(prices)[torch.randint(len(prices), shape, generator=generator)].to(tokens.device)
    tokens, routes, at = (values.tensor_split(ranks.count())[ranks.rank()] for values in (tokens, routes, price))
    parts = []
    for rows in _few_at_once(model, tokens):
        own, window, memory = routes[rows], tokens[rows], remember(model, tokens[rows])
        if base is not None:
            own = routes_of(base, model, window, memory, at[rows])
            if not torch.isin(own, codes.to(own.device)).all():
                raise ValueError(f"the base policy takes an action that is not among the allowed {', '.join(actions)}")
            routes[rows] = own
        losses, spent = deviations(RoutedPass(model, window, context="reference", memory=memory), own, codes.tolist())
        parts.append((*walked(model, window, memory, own, inputs), losses.flatten(1, 2), spent.flatten(1, 2)))
    hidden, compute, extra, losses, spent = map(_of_all_ranks, _joined(parts))
    return Deviations(hidden, compute, extra, price.flatten(), losses, spent, ranks.joined(routes).flatten(0, 1))


def _of_all_ranks(column: Any) -> Any:
    """The columns of all ranks, (L, n, ...) to (L, N, ...); None if there is none."""
    return None if column is None else ranks.joined(column.transpose(0, 1)).transpose(0, 1)


def _few_at_once(model: DuoForCausalLM, tokens: Tensor) -> Iterator[slice]:
    """Slices of windows (B, T+1), as many in each as the oracle's memory limit allows."""
    length = tokens.shape[1] - 1
    size = states_within(MEMORY_LIMIT, model, 1, length, 1) // length
    return (slice(first, first + size) for first in range(0, len(tokens), size))


def routes_of(
    router: Router, model: DuoForCausalLM, tokens: Tensor, memory: Memory, price: Tensor | None = None
) -> Tensor:
    """The routes that a router takes in the reference context, (B, T, L) action codes."""
    router.begin(model, tokens)
    return RoutedPass(model, tokens, context="reference", memory=memory, price=price).steer(router.decide)


def deviations(walk: RoutedPass, routes: Tensor, actions: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Loss and compute of every token if it takes another action in one layer and keeps the rest of its route.

    Args:
        walk: a pass at its start; it does not change.
        routes: (B, P, L), action codes.
        actions: the A action codes.

    Returns:
        Losses in nats and compute, both (L, B, P, A).
    """
    codes = torch.tensor(list(actions), device=routes.device)
    choice = torch.searchsorted(codes, routes)  # indices into codes
    own_loss, own_compute = _completed(walk.fork(), routes)
    losses, spent = (own[..., None].repeat(walk.depth, 1, 1, len(codes)) for own in (own_loss, own_compute))
    taken = walk.fork()
    while not taken.done:
        layer = taken.layer
        for offset in range(1, len(codes)):
            other = (choice[..., layer] + offset) % len(codes)
            child = taken.fork()
            child.step(codes[other])
            for column, found in zip((losses, spent), _completed(child, routes), strict=True):
                column[layer].scatter_(-1, other[..., None], found[..., None])
        taken.step(routes[..., layer])
    return losses, spent


def _completed(walk: RoutedPass, routes: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and compute, both (B, P), of a pass that follows routes (B, P, L) from its current layer."""
    walk.follow(routes)
    return walk.losses(), walk.compute


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


@torch.no_grad()
def walked_in_parts(
    model: DuoForCausalLM, tokens: Tensor, routes: Tensor, inputs: Inputs | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same as `walked`, for any number of windows."""
    parts = [
        walked(model, tokens[rows], remember(model, tokens[rows]), routes[rows], inputs)
        for rows in _few_at_once(model, tokens)
    ]
    hidden, compute, extra = _joined(parts)
    return hidden, compute, extra


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
