"""Training of the nearest-neighbour router: it stores hidden states and the best action in each of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from duorl.checks import require_positive
from duorl.learners.base import Learner, State, Task
from duorl.learners.labels import action_values, walked
from duorl.learners.sources import Source, require_stored
from duorl.oracle import RouteTable
from duorl.paths import RouterPath
from duorl.prices import ladder
from duorl.routed_pass import remember
from duorl.routers import KNNRouter
from duorl.routers.base import described, rebuilt
from duorl.routers.knn import unit


class KNN(Learner):
    """Stores the hidden states of labelled text, in the reference context, and the best action in each state.

    If all routes are searched, the states lie on the oracle's routes. Otherwise they lie on those of a base policy,
    and the action is the best single deviation from the route. For a range of prices, a state is stored once, on the
    route of one of the prices, with one action per price. `learn` always stores `windows` more windows, for any number
    of decisions.

    Args:
        env: the task; its seed also draws the prices of the routes.
        windows: number of windows to store; every token gives one state per layer.
        neighbours: number of nearest states that vote.
        temperature: a vote has the weight exp(-distance / temperature); states have length 1.
        rungs: number of prices with stored actions, evenly spaced in the range on a log scale.
        base: see `Supervised`.

    Raises:
        ValueError: a count is below 1, the temperature is not above 0, there are fewer states than `neighbours`, or the
            states do not fit into memory.
    """

    router: KNNRouter

    honours = frozenset({"prices"})

    def __init__(
        self,
        env: Task,
        *,
        windows: int = 32,
        neighbours: int = 64,
        temperature: float = 0.1,
        rungs: int = 5,
        base: RouterPath | None = None,
    ):
        super().__init__(env)
        require_positive(windows=windows, neighbours=neighbours, rungs=rungs)
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, not {temperature}")
        self.windows, self.neighbours, self.temperature, self.rungs = windows, neighbours, temperature, rungs
        self.source = Source(env.model, env.actions, base)
        self.source.require(self._text(1))
        require_stored(env, self._text(1)[:, 1:].numel(), windows)
        self.router = self._empty(self._text(1))

    @property
    def decisions_per_update(self) -> int:
        """Layer decisions of the windows that an update adds."""
        return self.env.layers * self._text(1)[:, 1:].numel()

    def span(self, total_decisions: int) -> int:
        """One update."""
        return self.decisions_per_update

    @property
    def prices(self) -> list[float]:
        """The prices for which actions are stored."""
        return [self.env.charged] if self.env.prices is None else ladder(self.env.prices, self.rungs)

    @torch.no_grad()
    def update(self) -> dict[str, float]:
        """Store `windows` more windows; returns the number of states by tag."""
        tokens = self._text(1 + self.decisions // self.decisions_per_update).to(self.env.model.device)
        router, generator = self._empty(tokens), torch.Generator().manual_seed(self.env.first_seed)
        states, choices = self._labelled(tokens, generator)
        router.states.copy_(unit(states))
        for rung, chosen in enumerate(choices):
            router.choices[rung] = chosen
        self.router = router
        return {"train/states": float(states.shape[1])}

    def _labelled(self, tokens: Tensor, generator: torch.Generator) -> tuple[Tensor, list[Tensor]]:
        """States (L, N, d), and per price the chosen actions (L, N)."""
        model, table = self.env.model, self.source.table(tokens)
        if table is None:
            found = self.source.deviations(tokens, self.prices, generator)
            return found.hidden, [found.values(price).argmax(-1) for price in self.prices]
        routes = routes_of_some_price(table, self.prices, generator)
        hidden, *_ = walked(model, tokens, remember(model, tokens), table.routes[routes])
        values = (action_values(table, price, routes, 0.0) for price in self.prices)
        return hidden, [found.argmax(-1).flatten(0, 1).T for found in values]

    def _text(self, updates: int) -> Tensor:
        return self.env.windows[: updates * self.windows]

    def _empty(self, tokens: Tensor) -> KNNRouter:
        env = self.env
        return KNNRouter(
            env.layers,
            env.model.hidden_size,
            tokens[:, 1:].numel(),
            env.actions,
            self.neighbours,
            self.temperature,
            env.prices,
            len(self.prices),
        ).to(env.model.device)

    def state(self) -> State:
        """See `Learner.state`; it has the sizes of the store, because they grow."""
        return {**super().state(), "description": described(self.router)}

    def restore(self, state: State) -> None:
        """See `Learner.restore`."""
        router = rebuilt(state["description"])
        assert isinstance(router, KNNRouter)
        self.router = router.to(self.env.model.device)
        super().restore(state)


def routes_of_some_price(table: RouteTable, prices: Sequence[float], generator: torch.Generator) -> Tensor:
    """Draw a price for each token; returns its best route at this price, (B, T) indices."""
    best = torch.stack([table.best(price) for price in prices])  # (P, B, T)
    drawn = torch.randint(len(prices), (1, *best.shape[1:]), generator=generator)
    return best.gather(0, drawn.to(best.device))[0]
