"""The supervised router: taught the oracle's values, no reinforcement learning.

One dataset serves all targets. In the reference context, where an exhaustive search gives every token's loss under
every route, some routes are walked, and at each of their prefixes every action has a value: what its completions are
worth,

    Q(prefix, a) = T * log mean over completions of exp(-(loss + price * compute) / T),

with T the temperature in nats. T -> 0 is the best completion, which only the oracle finds; a high T is the mean
completion, of a router that knows nothing more. softmax(Q / T) is the conditional P(a | prefix) of the distribution
over routes proportional to exp(-(loss + price * compute) / T), from which the walked routes are drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from duorl.checks import require_positive
from duorl.models.attention import Memory
from duorl.models.loading import require_frozen
from duorl.models.modeling import DuoForCausalLM
from duorl.oracle import RouteTable, exhaustive
from duorl.routed_pass import RoutedPass, remember
from duorl.routers.heads import HeadRouter, check_prices

Target = Literal["action", "soft", "value", "cost"]


@dataclass(frozen=True)
class SupervisedOptions:
    """How the supervised router is trained.

    Args:
        windows: windows of router-training text that the oracle labels.
        target: what is learned: `action`, the oracle's own action on its best route; `soft`, the distribution over
            actions that the temperature makes of their values; `value`, the values' differences, by squared error;
            `cost`, to lose little value in the mean (cost-sensitive classification).
        temperature: of the values and of the walked routes, in nats; `action` is the limit 0.
        rungs: prices of a range that are labelled, evenly spaced on a log scale.
        epochs: passes over the labelled decisions.
        batch_size: decisions per update.
        learning_rate: of Adam.
        width: hidden units of a head; 0 for a linear map.
    """

    windows: int = 64
    target: Target = "cost"
    temperature: float = 1.0
    rungs: int = 5
    epochs: int = 5
    batch_size: int = 4096
    learning_rate: float = 3e-3
    width: int = 0

    def __post_init__(self) -> None:
        require_positive(windows=self.windows, epochs=self.epochs, batch_size=self.batch_size, rungs=self.rungs)
        if self.target not in get_args(Target):
            raise ValueError(f"unknown target {self.target!r}: choose from {', '.join(get_args(Target))}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0 nats, not {self.temperature}")


@dataclass(frozen=True)
class Decisions:
    """What was seen along N walked routes, and what each action was worth there.

    Attributes:
        hidden: (L, N, d), what the layers' FFNs would read.
        compute: (L, N), spent before the decision.
        price: (N,), nats per all-big pass.
        values: (L, N, A), nats, in the order of the actions' codes.
    """

    hidden: Tensor
    compute: Tensor
    price: Tensor
    values: Tensor


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


@torch.no_grad()
def label(
    model: DuoForCausalLM,
    tokens: Tensor,
    *,
    prices: Sequence[float],
    actions: Sequence[str],
    temperature: float,
    generator: torch.Generator,
) -> Decisions:
    """Search the tokens once, and at every price draw routes, walk them, and value the actions beside them.

    Args:
        model: a duo model.
        tokens: (B, T+1).
        prices: P of them, nats per all-big pass.
        actions: names of the allowed actions.
        temperature: nats; 0 for the oracle's own routes.
        generator: of the drawn routes.

    Returns:
        N = P * B * T routes' decisions, the token varying fastest.
    """
    tokens = tokens.to(model.device)
    table, memory = exhaustive(model, tokens, context="reference", actions=actions), remember(model, tokens)
    parts = []
    for price in prices:
        routes = draw_routes(table, price, temperature, generator)
        values = action_values(table, price, routes, temperature).flatten(0, 1).transpose(0, 1)
        hidden, compute = walked(model, tokens, memory, table.routes[routes])
        parts.append((hidden, compute, torch.full_like(compute, price), values))
    hidden, compute, price_, values = (torch.cat(column, dim=1) for column in zip(*parts, strict=True))
    return Decisions(hidden, compute, price_[0], values)


def walked(model: DuoForCausalLM, tokens: Tensor, memory: Memory, routes: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states (L, N, d) and compute spent (L, N) along routes (B, T, L)."""
    walk = RoutedPass(model, tokens, context="reference", memory=memory)
    hidden, compute = [], []
    while not walk.done:
        hidden.append(walk.hidden.flatten(0, 1))
        compute.append(walk.compute.flatten())
        walk.step(routes[..., walk.layer])
    return torch.stack(hidden), torch.stack(compute)


def target_loss(scores: Tensor, values: Tensor, *, target: Target, temperature: float) -> Tensor:
    """The mean over decisions of what a target asks for.

    Args:
        scores: (..., A), the heads' outputs.
        values: (..., A), nats.
        target: see `SupervisedOptions`.
        temperature: nats, of `soft`.
    """
    scores, values = scores.flatten(0, -2), values.flatten(0, -2)
    if target == "action":
        return cross_entropy(scores, values.argmax(-1))
    if target == "soft":
        return cross_entropy(scores, (values / temperature).softmax(-1))
    values = _centred(values)  # only differences between actions decide
    if target == "value":
        return (_centred(scores) - values).square().sum(-1).mean()
    return -(scores.softmax(-1) * values).sum(-1).mean()


def _centred(numbers: Tensor) -> Tensor:
    return numbers - numbers.mean(-1, keepdim=True)


def fit(
    router: HeadRouter, decisions: Decisions, *, options: SupervisedOptions, seed: int, pool: Tensor | None = None
) -> HeadRouter:
    """Train a router's heads on labelled decisions, in place.

    Args:
        router: with the price as an input where the decisions' prices differ.
        decisions: see `label`.
        options: see `SupervisedOptions`.
        seed: of the order.
        pool: indices of the routes to learn from, with repeats for a bootstrap; all N unless given.
    """
    optimizer = torch.optim.Adam(router.parameters(), lr=options.learning_rate)
    generator = torch.Generator().manual_seed(seed)
    layers, count = decisions.compute.shape
    pool = torch.arange(count) if pool is None else pool
    size = max(1, options.batch_size // layers)  # routes per update, each with its L decisions
    for _ in range(options.epochs):
        for index in pool[torch.randperm(len(pool), generator=generator)].split(size):
            scores = _scores(router, decisions, index)
            values = decisions.values[:, index]
            loss = target_loss(scores, values, target=options.target, temperature=options.temperature)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return router.eval().requires_grad_(False)


def _scores(router: HeadRouter, decisions: Decisions, index: Tensor) -> Tensor:
    """(L, n, A)."""
    hidden, compute, price = decisions.hidden, decisions.compute, decisions.price[index]
    layers = range(len(hidden))
    return torch.stack([router.score(hidden[layer, index], layer, compute[layer, index], price) for layer in layers])


def ladder(prices: tuple[float, float] | None, price: float, rungs: int) -> list[float]:
    """The prices to label: evenly spaced on a log scale over a range, its ends among them; without one, the price."""
    if prices is None:
        return [price]
    low, high = check_prices(prices)
    return [low * (high / low) ** (rung / max(1, rungs - 1)) for rung in range(rungs)]


def label_for(
    model: DuoForCausalLM,
    windows: Tensor,
    options: SupervisedOptions,
    *,
    price: float,
    prices: tuple[float, float] | None,
    actions: Sequence[str],
    seed: int,
) -> Decisions:
    """The decisions that `options` ask for; arguments as for `train_supervised`."""
    require_frozen(model)
    return label(
        model,
        windows[: options.windows],
        prices=ladder(prices, price, options.rungs),
        actions=actions,
        temperature=0.0 if options.target == "action" else options.temperature,
        generator=torch.Generator().manual_seed(seed),
    )


def train_supervised(
    model: DuoForCausalLM,
    windows: Tensor,
    *,
    price: float,
    prices: tuple[float, float] | None = None,
    actions: Sequence[str] = ("small", "big"),
    options: SupervisedOptions | None = None,
    seed: int = 0,
) -> HeadRouter:
    """Teach a router what an exhaustive search knows of some text.

    Args:
        model: a frozen duo model.
        windows: (W, T+1) router-training text; the first `options.windows` are searched.
        price: nats per all-big pass, where no range is given.
        prices: lowest and highest, for a router that takes the price as an input: `options.rungs` of them are labelled.
        actions: names of the allowed actions.
        options: see `SupervisedOptions`.
        seed: of the initial weights, the drawn routes and the order of the decisions.

    Raises:
        ValueError: the model has a trainable parameter, or the range of prices is empty or not above 0.
    """
    options = options or SupervisedOptions()
    decisions = label_for(model, windows, options, price=price, prices=prices, actions=actions, seed=seed)
    router = HeadRouter(model.num_layers, model.hidden_size, actions, options.width, seed, prices).to(model.device)
    return fit(router, decisions, options=options, seed=seed)
