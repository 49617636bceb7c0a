"""The nearest-neighbour router: nothing is fitted, states are looked up among those that the oracle decided.

The counterpart of Reference Trustable Decoding (2024): a datastore from hidden states to answers, read with the
weights exp(-distance / temperature). Here the answers are the oracle's actions, one store per layer.

    router = train_knn(model, windows, price=0.3)
    router.shares(walk.hidden, walk.layer)                   # (B, T, A), the neighbours' votes
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torch.nn.functional import layer_norm, one_hot

from duorl.checks import require_positive
from duorl.costs import action_ids
from duorl.models.loading import require_frozen
from duorl.models.modeling import DuoForCausalLM
from duorl.oracle import RouteTable, exhaustive
from duorl.routed_pass import remember
from duorl.routers.base import Router
from duorl.routers.heads import check_prices
from duorl.routers.supervised import action_values, ladder, walked


@dataclass(frozen=True)
class KNNOptions:
    """What the nearest-neighbour router looks up.

    Args:
        windows: windows of router-training text that the oracle decides; every token is one state per layer.
        neighbours: states that vote.
        temperature: of a vote's weight exp(-distance / temperature); states lie on the unit sphere.
        rungs: prices of a range for which actions are stored, evenly spaced on a log scale.
    """

    windows: int = 32
    neighbours: int = 64
    temperature: float = 0.1
    rungs: int = 5

    def __post_init__(self) -> None:
        require_positive(windows=self.windows, neighbours=self.neighbours, rungs=self.rungs)
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, not {self.temperature}")


class KNNRouter(Router):
    """Takes the action that the nearest stored states of the layer vote for.

    Args:
        layers: L.
        hidden_size: d.
        size: states per layer, N.
        actions: names of the actions it chooses from, A of them.
        neighbours: states that vote.
        temperature: of their weights.
        prices: lowest and highest of the prices it stores actions for; None for one.
        rungs: number of these prices, P.
        price: the price it is deployed at; see `at`.

    Attributes:
        states: (L, N, d), of unit length.
        choices: (P, L, N) uint8, the oracle's actions as indices into `codes`.

    Raises:
        ValueError: the range of prices is empty or not above 0, or fewer states are stored than shall vote.
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
            raise ValueError(f"{neighbours} neighbours among {size} states: store more windows or ask fewer")
        self.prices = None if prices is None else check_prices(prices)
        self.codes: Tensor
        self.states: Tensor
        self.choices: Tensor
        self.register_buffer("codes", action_ids(actions), persistent=False)
        self.register_buffer("states", torch.zeros(layers, size, hidden_size))
        self.register_buffer("choices", torch.zeros(rungs, layers, size, dtype=torch.uint8))
        self._searches: dict[int, NearestNeighbors] = {}

    def shares(self, hidden: Tensor, layer: int) -> Tensor:
        """What part of the neighbours' weight votes for each action.

        Args:
            hidden: (..., d).
            layer: its index.

        Returns:
            Shape (..., A), sums to 1.
        """
        queries = unit(hidden).flatten(0, -2).cpu().numpy()
        distance, index = (torch.from_numpy(found) for found in self._search(layer).kneighbors(queries))
        weights = (-distance / self.config["temperature"]).softmax(-1)  # far from all, exp alone would be 0 for all
        votes = one_hot(self.choices[self._rung, layer].cpu()[index].long(), len(self.codes))  # (n, neighbours, A)
        return (weights[:, None] @ votes.double()).view(*hidden.shape[:-1], -1).to(hidden)

    @property
    def _rung(self) -> int:
        if self.prices is None:
            return 0
        price = self.config["price"]
        if price is None:
            raise ValueError("this router has actions for several prices: use router.at(price=...)")
        rungs = ladder(self.prices, price, self.config["rungs"])
        return min(range(len(rungs)), key=lambda rung: abs(math.log(rungs[rung] / price)))

    def _search(self, layer: int) -> NearestNeighbors:
        if layer not in self._searches:
            search = NearestNeighbors(n_neighbors=self.config["neighbours"], algorithm="brute")
            self._searches[layer] = search.fit(self.states[layer].cpu().numpy())
        return self._searches[layer]

    def forward(self, hidden: Tensor, layer: int, compute: Tensor) -> Tensor:
        """(...), the action with the greatest share; see `Router.forward`."""
        return self.codes[self.shares(hidden, layer).argmax(-1)]


def unit(hidden: Tensor) -> Tensor:
    """States (..., d) normalised as the heads see them, and scaled to length 1."""
    return layer_norm(hidden, hidden.shape[-1:]) * hidden.shape[-1] ** -0.5


def routes_of_some_price(table: RouteTable, prices: Sequence[float], generator: torch.Generator) -> Tensor:
    """Each token's best route at a price drawn for it: (B, T) indices."""
    best = torch.stack([table.best(price) for price in prices])  # (P, B, T)
    drawn = torch.randint(len(prices), (1, *best.shape[1:]), generator=generator)
    return best.gather(0, drawn.to(best.device))[0]


@torch.no_grad()
def train_knn(
    model: DuoForCausalLM,
    windows: Tensor,
    *,
    price: float,
    prices: tuple[float, float] | None = None,
    actions: Sequence[str] = ("small", "big"),
    options: KNNOptions | None = None,
    seed: int = 0,
) -> KNNRouter:
    """Store the states along the oracle's routes, in the reference context, and what the oracle does there.

    For a range of prices a state is stored once: it lies on the best route of one of the prices, and every price's
    action is the first of the best completion from there.

    Args:
        model: a frozen duo model.
        windows: (W, T+1) router-training text; the first `options.windows` are searched.
        price: nats per all-big pass, where no range is given.
        prices: lowest and highest, for a router of a range: `options.rungs` of them are stored.
        actions: names of the allowed actions.
        options: see `KNNOptions`.
        seed: of the prices whose routes are walked.

    Raises:
        ValueError: the model has a trainable parameter, the range of prices is empty or not above 0, or the windows
            have fewer tokens than shall vote.
    """
    require_frozen(model)
    options = options or KNNOptions()
    rungs = ladder(prices, price, options.rungs)
    tokens = windows[: options.windows].to(model.device)
    table = exhaustive(model, tokens, context="reference", actions=actions)
    routes = routes_of_some_price(table, rungs, torch.Generator().manual_seed(seed))
    hidden, _ = walked(model, tokens, remember(model, tokens), table.routes[routes])
    router = KNNRouter(
        model.num_layers,
        model.hidden_size,
        hidden.shape[1],
        actions,
        options.neighbours,
        options.temperature,
        prices,
        len(rungs),
    )
    router.states.copy_(unit(hidden))
    for rung, known in enumerate(rungs):
        router.choices[rung] = action_values(table, known, routes, 0.0).argmax(-1).flatten(0, 1).T
    return router.eval().to(model.device)
