"""The nearest-neighbour router: it finds the nearest stored hidden states, and their actions vote.

It follows Reference Trustable Decoding (2024), which stores hidden states with answers and weights the nearest ones by
exp(-distance / temperature). Here the answers are the oracle's actions, with one store per layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torch.nn.functional import layer_norm, one_hot

from duorl.costs import action_ids
from duorl.inputs import View
from duorl.prices import check_prices, ladder
from duorl.routers.base import LogitRouter


class KNNRouter(LogitRouter):
    """Takes the action for which the nearest stored states of the layer vote.

    Args:
        layers: L.
        hidden_size: d.
        size: number of stored states per layer, N.
        actions: names of the actions it chooses from, A of them.
        neighbours: number of nearest states that vote.
        temperature: a vote has the weight exp(-distance / temperature).
        prices: lowest and highest price with stored actions; None for one price.
        rungs: number of prices with stored actions, P.
        price: the price it is deployed at; see `at`.

    Attributes:
        states: (L, N, d), of unit length.
        choices: (P, L, N) uint8, the oracle's actions as indices into `codes`.

    Raises:
        ValueError: the range of prices is empty or not above 0, or `neighbours` is larger than `size`.
    """

    def __init__(
        self,
        layers: int,
        hidden_size: int,
        size: int,
        actions: Sequence[str] = ("small", "big"),
        neighbours: int = 64,
        temperature: float = 0.1,
        prices: Sequence[float] | None = None,
        rungs: int = 1,
        price: float | None = None,
    ):
        super().__init__(
            layers=layers,
            hidden_size=hidden_size,
            size=size,
            actions=list(actions),
            neighbours=neighbours,
            temperature=temperature,
            prices=None if prices is None else list(prices),
            rungs=rungs,
            price=price,
        )
        if neighbours > size:
            raise ValueError(f"neighbours {neighbours} is more than the {size} states: store more windows or lower it")
        self.prices = None if prices is None else check_prices(prices)
        self.states: Tensor
        self.choices: Tensor
        self.register_buffer("codes", action_ids(actions), persistent=False)
        self.register_buffer("states", torch.zeros(layers, size, hidden_size))
        self.register_buffer("choices", torch.zeros(rungs, layers, size, dtype=torch.uint8))
        self._searches: dict[int, NearestNeighbors] = {}

    def check(self) -> None:
        """Every choice is one of the actions; see `Router.check`."""
        if self.choices.max() >= len(self.codes):
            raise ValueError(f"choices are 0 to {len(self.codes) - 1}, not {self.choices.max()}")

    def flops(self) -> float:
        """See `Router.flops`: the search compares a token with all stored states, as one matrix product per layer."""
        return 2.0 * self.states.numel()

    def votes(self, hidden: Tensor, layer: int) -> Tensor:
        """Share of the votes for each action.

        Args:
            hidden: (..., d).
            layer: index of the layer.

        Returns:
            Shape (..., A), sums to 1.
        """
        queries = unit(hidden).flatten(0, -2).cpu().numpy()
        distance, index = (torch.from_numpy(found) for found in self._search(layer).kneighbors(queries))
        weights = (-distance / self.config["temperature"]).softmax(-1)  # exp alone is 0 if all are far away
        chosen = one_hot(self.choices[self._rung, layer].cpu()[index].long(), len(self.codes))  # (n, neighbours, A)
        return (weights[:, None] @ chosen.double()).view(*hidden.shape[:-1], -1).to(self.states)

    @property
    def _rung(self) -> int:
        if self.prices is None:
            return 0
        price = self.config["price"]
        if price is None:
            raise ValueError("this router has actions for several prices: use router.at(price=...)")
        rungs = ladder(self.prices, self.config["rungs"])
        return min(range(len(rungs)), key=lambda rung: abs(math.log(rungs[rung] / price)))

    def _search(self, layer: int) -> NearestNeighbors:
        if layer not in self._searches:
            search = NearestNeighbors(n_neighbors=self.config["neighbours"], algorithm="brute")
            self._searches[layer] = search.fit(self.states[layer].cpu().numpy())
        return self._searches[layer]

    def logits(self, view: View) -> Tensor:
        """The shares of the votes, (..., A); see `LogitRouter.logits`."""
        return self.votes(view.hidden, view.layer)


def unit(hidden: Tensor) -> Tensor:
    """Hidden states (..., d), normalized as for the heads, and scaled to length 1."""
    return layer_norm(hidden.float(), hidden.shape[-1:]) * hidden.shape[-1] ** -0.5
