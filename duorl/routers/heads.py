"""HeadRouter: one small network per layer on the hidden state, the policy that every learner here trains.

A router may be trained for a range of prices at once; it then takes the price as an input, and
`router.at(price=0.3)` is the router at one of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, one_hot

from duorl.costs import action_ids
from duorl.routers.base import Router

PRICE_FEATURES = 2
_LEANING = 2.0  # nats by which a route's actions start out likelier
_SCALE = 4.0  # of the price's features: one weight each has to shift what hidden_size weights decide


def price_features(price: Tensor, prices: tuple[float, float]) -> Tensor:
    """What heads see of a price: its place in the range they were trained for, on a log and on a linear scale.

    Args:
        price: (...), nats per all-big pass.
        prices: lowest and highest.

    Returns:
        Shape (..., 2).
    """
    low, high = prices
    place = (price / low).log() / math.log(high / low) * 2 - 1
    return _SCALE * torch.stack([place, price / high], dim=-1)


def update_norm(hidden: Tensor, previous: Tensor | None) -> Tensor:
    """|dh| / |h|: how far a layer moved a token's normalised state, DynaLay's sign of its own uncertainty.

    Args:
        hidden: (..., d), what this layer's FFN would read.
        previous: (..., d), what the layer before it read; None at the first, which counts as no move.

    Returns:
        Shape (..., 1).
    """
    if previous is None:
        return hidden.new_zeros(*hidden.shape[:-1], 1)
    now, before = (layer_norm(x, x.shape[-1:]) for x in (hidden, previous))
    return (now - before).norm(dim=-1, keepdim=True) / before.norm(dim=-1, keepdim=True)


class LayerHeads(nn.Module):
    """One head per layer: a linear map, or a perceptron with one hidden layer, on the normalised state and the compute.

    Args:
        layers: number of layers, L.
        hidden_size: d.
        outputs: numbers per head, O.
        width: hidden units; 0 for a linear map.
        generator: of the initial weights.
        conditions: further inputs, C.
    """

    def __init__(
        self,
        layers: int,
        hidden_size: int,
        outputs: int,
        width: int,
        generator: torch.Generator,
        conditions: int = 0,
    ):
        super().__init__()
        inputs = hidden_size + 1 + conditions
        sizes = [inputs, width, outputs] if width else [inputs, outputs]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        if width < 0:
            raise ValueError(f"width must be at least 0 hidden units, not {width}")
        for depth, (fan_in, fan_out) in enumerate(pairwise(sizes), start=2):
            scale = 0.01 if depth == len(sizes) else 2**0.5  # start near the uniform policy
            weight = torch.randn(layers, fan_in, fan_out, generator=generator) * scale * fan_in**-0.5
            self.weights.append(nn.Parameter(weight))
            self.biases.append(nn.Parameter(torch.zeros(layers, fan_out)))

    def forward(self, hidden: Tensor, layer: int | Tensor, compute: Tensor, conditions: Tensor | None = None) -> Tensor:
        """Apply the layers' heads.

        Args:
            hidden: (..., d).
            layer: one index for all, or (N,) where hidden is (N, d).
            compute: (...), spent so far.
            conditions: (..., C), where there are any.

        Returns:
            Shape (..., O).
        """
        parts = [layer_norm(hidden, hidden.shape[-1:]), compute[..., None]]
        x = torch.cat(parts if conditions is None else [*parts, conditions], dim=-1)
        if isinstance(layer, int):
            return self._head(x, layer)
        order = layer.argsort()
        counts = layer.bincount(minlength=len(self.weights[0])).tolist()
        groups = x[order].split(counts)
        outputs = torch.cat([self._head(group, index) for index, group in enumerate(groups) if len(group)])
        return torch.empty_like(outputs).index_copy(0, order, outputs)

    def _head(self, x: Tensor, layer: int) -> Tensor:
        for depth, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = (torch.relu(x) if depth else x) @ weight[layer] + bias[layer]
        return x


class HeadRouter(Router):
    """A policy with one head per layer; deployed, it takes the likeliest action.

    Args:
        layers: L.
        hidden_size: d.
        actions: names of the actions it chooses from, A of them.
        width: hidden units of a head; 0 for the paper's linear map (Duo-LLM, stage 3).
        seed: of the initial weights.
        prices: lowest and highest price it is trained for, which makes the price an input; None for a router of one.
        price: the price it is deployed at, in nats per all-big pass; see `at`.
        signals: heads also see how far the layer before moved the state (`update_norm`).

    Raises:
        ValueError: the range of prices is empty or not above 0, or the price is outside of it.
    """

    def __init__(
        self,
        layers: int,
        hidden_size: int,
        actions: Sequence[str] = ("small", "big"),
        width: int = 0,
        seed: int = 0,
        prices: Sequence[float] | None = None,
        price: float | None = None,
        signals: bool = False,
    ):
        super().__init__(
            layers=layers,
            hidden_size=hidden_size,
            actions=list(actions),
            width=width,
            seed=seed,
            prices=None if prices is None else list(prices),
            price=price,
            signals=signals,
        )
        self.prices = None if prices is None else check_prices(prices)
        self.codes: Tensor
        self.register_buffer("codes", action_ids(actions), persistent=False)
        self.conditions = PRICE_FEATURES * (prices is not None) + signals
        generator = torch.Generator().manual_seed(seed)
        self.heads = LayerHeads(layers, hidden_size, len(actions), width, generator, self.conditions)
        self._previous: Tensor | None = None

    def leaning(self, route: Sequence[int]) -> HeadRouter:
        """This router, its biases moved so that it starts out near a route of L action codes, and still explores.

        Raises:
            ValueError: the route takes an action that is not among the router's.
        """
        known = self.codes.tolist()
        taken = torch.tensor([known.index(action) for action in route])
        self.heads.biases[-1].data += _LEANING * one_hot(taken, len(known))
        return self

    def logits(self, hidden: Tensor, layer: int | Tensor, compute: Tensor, conditions: Tensor | None = None) -> Tensor:
        """Scores of the A actions, (..., A), in the order of their codes; arguments as for `LayerHeads`."""
        return self.heads(hidden, layer, compute, conditions)

    def score(self, hidden: Tensor, layer: int, compute: Tensor, price: Tensor | None = None) -> Tensor:
        """The same inside a pass, layer after layer: the router makes its further inputs itself.

        Args:
            hidden: (..., d).
            layer: its index.
            compute: (...), spent so far.
            price: (...), or broadcastable to it; the price of `at` unless given.
        """
        return self.logits(hidden, layer, compute, self._conditions(hidden, layer, price))

    def _conditions(self, hidden: Tensor, layer: int, price: Tensor | None) -> Tensor | None:
        parts = []
        if self.prices is not None:
            if price is None and self.config["price"] is None:
                raise ValueError("this router takes the price as an input: use router.at(price=...)")
            price = torch.as_tensor(self.config["price"] if price is None else price, device=hidden.device)
            parts.append(price_features(price.expand(hidden.shape[:-1]), self.prices))
        if self.config["signals"]:
            parts.append(update_norm(hidden, self._previous if layer else None))
            self._previous = hidden.detach()
        return torch.cat(parts, dim=-1).to(hidden.dtype) if parts else None

    def forward(self, hidden: Tensor, layer: int, compute: Tensor) -> Tensor:
        """(...), the likeliest action; see `Router.forward`."""
        return self.codes[self.score(hidden, layer, compute).argmax(-1)]


def check_prices(prices: Sequence[float]) -> tuple[float, float]:
    """A range of prices, lowest and highest.

    Raises:
        ValueError: it is not two numbers, rising and above 0.
    """
    if len(prices) != 2 or not 0 < prices[0] < prices[1]:
        raise ValueError(f"prices must be the lowest and the highest, both above 0, not {list(prices)}")
    return float(prices[0]), float(prices[1])


def draw_prices(prices: tuple[float, float], count: int, generator: torch.Generator) -> Tensor:
    """Prices uniform on a log scale, (count,): a router that answers for all of them meets all of them."""
    low, high = prices
    return low * torch.exp(torch.rand(count, generator=generator) * math.log(high / low))
