"""The nearest-neighbour router's datastore: the states along good routes, and the best action from there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from duorl.checks import require_positive
from duorl.learners.base import Learner, State, Task
from duorl.learners.labels import action_values, searched, walked, walked_randomly
from duorl.oracle import RouteTable
from duorl.prices import ladder
from duorl.routed_pass import remember
from duorl.routers import KNNRouter
from duorl.routers.base import described, rebuilt
from duorl.routers.knn import unit


class KNN(Learner):
    """Stores the states of labelled text, in the reference context, and what the best completion does there.

    Where all routes can be enumerated the states lie on the oracle's routes; elsewhere on random ones, and the action
    is the best single deviation from them. For a range of prices a state is stored once: it lies on the best route of
    one of the prices, and every price's action is stored. `learn` stores `windows` windows more, whatever number of
    decisions it is asked for.

    Args:
        env: the task; its seed also draws the prices whose routes are walked.
        windows: windows of its text that are stored; every token is one state per layer.
        neighbours: states that vote.
        temperature: of a vote's weight exp(-distance / temperature); states lie on the unit sphere.
        rungs: prices of a range for which actions are stored, evenly spaced on a log scale.

    Raises:
        ValueError: a count below 1, a temperature that is not above 0, or fewer states than shall vote.
    """

    router: KNNRouter

    def __init__(self, env: Task, *, windows: int = 32, neighbours: int = 64, temperature: float = 0.1, rungs: int = 5):
        super().__init__(env)
        require_positive(windows=windows, neighbours=neighbours, rungs=rungs)
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, not {temperature}")
        self.windows, self.neighbours, self.temperature, self.rungs = windows, neighbours, temperature, rungs
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
        """Those for which actions are stored."""
        return [self.env.charged] if self.env.prices is None else ladder(self.env.prices, self.rungs)

    @torch.no_grad()
    def update(self) -> dict[str, float]:
        """Store the windows so far and as many again; returns the number of states by tag."""
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
        model, actions = self.env.model, self.env.actions
        table = searched(model, tokens, actions)
        if table is None:
            hidden, _, _, losses, spent = walked_randomly(model, tokens, actions, generator)
            return hidden, [(losses + price * spent).argmin(-1) for price in self.prices]
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
        """See `Learner.state`; the store has grown, so its sizes are in it."""
        return {**super().state(), "description": described(self.router)}

    def restore(self, state: State) -> None:
        """See `Learner.restore`."""
        router = rebuilt(state["description"])
        assert isinstance(router, KNNRouter)
        self.router = router.to(self.env.model.device)
        super().restore(state)


def routes_of_some_price(table: RouteTable, prices: Sequence[float], generator: torch.Generator) -> Tensor:
    """Each token's best route at a price drawn for it: (B, T) indices."""
    best = torch.stack([table.best(price) for price in prices])  # (P, B, T)
    drawn = torch.randint(len(prices), (1, *best.shape[1:]), generator=generator)
    return best.gather(0, drawn.to(best.device))[0]
