"""What a router sees, made in one place.

A pass that stands in front of a layer's feed-forward network offers a `View`: all that a router may look at. The hidden
state and the compute spent so far are inputs of every router. Further ones are functions of a view, (..., d) in and
(..., k) numbers out, and are named in a list, ours by their names in `INPUTS`, yours by import path:

    def big_so_far(view):                                 # in mine.py: --env.inputs '["mine.big_so_far"]'
        return sum((taken == 2 for taken in view.taken), torch.zeros_like(view.compute))[..., None]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from duorl.extensions import find
from duorl.prices import check_prices

_PRICE_SCALE = 4.0  # one weight each has to shift what hidden_size weights decide


@dataclass(frozen=True)
class View:
    """A pass, seen from where one layer is decided.

    Attributes:
        hidden: (..., d), what the layer's FFN would read.
        layer: its index.
        compute: (...), spent so far, in [0, 1].
        previous: (..., d), what the layer before read; None at the first layer.
        taken: per layer before this one the actions, (...) int64 codes 0 skip, 1 small, 2 big.
        price: (...), nats per all-big pass; None where the pass has none.
    """

    hidden: Tensor
    layer: int
    compute: Tensor
    previous: Tensor | None = None
    taken: tuple[Tensor, ...] = ()
    price: Tensor | None = None

    def by_token(self) -> View:
        """The same with all tokens in one axis: (N, d) for the hidden state, (N,) for the rest."""
        count = self.compute.numel()

        def vectors(states: Tensor | None) -> Tensor | None:
            return None if states is None else states.reshape(count, -1)

        return View(
            hidden=self.hidden.reshape(count, -1),
            layer=self.layer,
            compute=self.compute.reshape(count),
            previous=vectors(self.previous),
            taken=tuple(actions.reshape(count) for actions in self.taken),
            price=None if self.price is None else self.price.expand_as(self.compute).reshape(count),
        )


Input = Callable[[View], Tensor]
"""A further input of a router: from a view to (..., k) numbers, of each token by itself."""


def update_norm(view: View) -> Tensor:
    """|dh| / |h|: how far the layer before moved a token's normalised state, (..., 1); 0 at the first layer.

    DynaLay's sign of its own uncertainty (2023).

    Raises:
        ValueError: the view does not know what the layer before read.
    """
    if view.layer == 0:
        return view.hidden.new_zeros(*view.hidden.shape[:-1], 1)
    if view.previous is None:
        raise ValueError("update_norm compares a layer with the one before: decide on a pass's view, walk.view")
    states = (x.to(view.compute.dtype) for x in (view.hidden, view.previous))  # a low precision hides small steps
    now, before = (layer_norm(x, x.shape[-1:]) for x in states)
    return (now - before).norm(dim=-1, keepdim=True) / before.norm(dim=-1, keepdim=True)


INPUTS: dict[str, Input] = {"update_norm": update_norm}


class Inputs:
    """A router's further inputs: those of a list, and the price, where the router is trained for a range of prices.

    Args:
        names: keys of `INPUTS`, or import paths of functions of one's own.
        prices: lowest and highest price; the price's place between them is then an input. None: it is not.

    Raises:
        ValueError: a name is unknown or named twice, or the range is empty or not above 0.
    """

    def __init__(self, names: Sequence[str] = (), prices: Sequence[float] | None = None):
        self.names = list(names)
        self.prices = None if prices is None else check_prices(prices)
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"inputs must be named once each, not {self.names}")
        self._functions = [_named(name) for name in self.names]

    def __call__(self, view: View) -> Tensor | None:
        """(..., C), the inputs side by side, the price first; None where there are none.

        Raises:
            ValueError: the view has no price, but the router takes one.
        """
        return self.joined(view, self.listed(view))

    def listed(self, view: View) -> Tensor | None:
        """Those of the list alone."""
        parts = [function(view) for function in self._functions]
        return torch.cat(parts, dim=-1).to(view.compute.dtype) if parts else None

    def joined(self, view: View, listed: Tensor | None) -> Tensor | None:
        """All of them, where those of the list are known already, with the price of a view."""
        if self.prices is None:
            return listed
        price = _price_features(view, self.prices).to(view.compute.dtype)
        return price if listed is None else torch.cat([price, listed], dim=-1)

    def width(self, hidden_size: int) -> int:
        """C, found by trying the inputs on the first layer of one token."""
        trial = View(torch.zeros(1, hidden_size), 0, torch.zeros(1))
        if self.prices is not None:
            trial = replace(trial, price=torch.full((1,), self.prices[0]))
        found = self(trial)
        return 0 if found is None else found.shape[-1]


def _named(name: str) -> Input:
    if name in INPUTS:
        return INPUTS[name]
    if "." not in name:
        raise ValueError(f"unknown input {name!r}: choose from {', '.join(INPUTS)}, or give an import path")
    return find(name)


def _price_features(view: View, prices: tuple[float, float]) -> Tensor:
    """The price's place in a range, on a log and on a linear scale: (..., 2)."""
    if view.price is None:
        raise ValueError("this router takes the price as an input: use router.at(price=...)")
    low, high = prices
    price = view.price.expand_as(view.compute)
    place = (price / low).log() / math.log(high / low) * 2 - 1
    return _PRICE_SCALE * torch.stack([place, price / high], dim=-1)
