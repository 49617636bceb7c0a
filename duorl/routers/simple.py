"""Routers that learn nothing: one action, random actions, one fixed pattern, and the oracle, which sees the label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from duorl.costs import ACTIONS, action_ids
from duorl.prices import check_price
from duorl.routers.base import Router

if TYPE_CHECKING:
    from duorl.models.modeling import DuoForCausalLM


class ConstantRouter(Router):
    """The same action for every token in every layer.

    Args:
        action: `skip`, `small` or `big`.
    """

    def __init__(self, action: str):
        super().__init__(action=action)
        self.code = int(action_ids([action]))

    def forward(self, hidden: Tensor, layer: int, compute: Tensor) -> Tensor:
        """(...), the same action for all; see `Router.forward`."""
        return torch.full(hidden.shape[:-1], self.code, device=hidden.device)


class RandomRouter(Router):
    """Draws each decision uniformly.

    Args:
        actions: names of the actions to draw from.
        seed: seed of the draws.
    """

    def __init__(self, actions: Sequence[str] = ("small", "big"), seed: int = 0):
        super().__init__(actions=list(actions), seed=seed)
        self.codes = action_ids(actions)
        self.generator = torch.Generator().manual_seed(seed)

    def forward(self, hidden: Tensor, layer: int, compute: Tensor) -> Tensor:
        """(...), drawn anew at every call; see `Router.forward`."""
        drawn = torch.randint(len(self.codes), hidden.shape[:-1], generator=self.generator)
        return self.codes[drawn].to(hidden.device, non_blocking=True)


class PatternRouter(Router):
    """One route for all tokens.

    Args:
        route: L action codes.
    """

    def __init__(self, route: Sequence[int]):
        super().__init__(route=[int(action) for action in route])
        if not route or not set(self.config["route"]) <= set(range(len(ACTIONS))):
            raise ValueError(f"a route has codes 0 to {len(ACTIONS) - 1} ({', '.join(ACTIONS)}), not {list(route)}")

    def sizes(self) -> tuple[int | None, int | None]:
        """The route's length."""
        return len(self.config["route"]), None

    def forward(self, hidden: Tensor, layer: int, compute: Tensor) -> Tensor:
        """(...), the route's action in this layer; see `Router.forward`."""
        return torch.full(hidden.shape[:-1], self.config["route"][layer], device=hidden.device)


class ReplayRouter(Router):
    """Repeats given routes on given windows, for example those that a search found.

    Args:
        shape: (B, T, L), shape of the routes.

    Attributes:
        windows: (B, T+1), the tokens.
        routes: (B, T, L), action codes.
    """

    windows: Tensor
    routes: Tensor

    def __init__(self, shape: Sequence[int]):
        super().__init__(shape=list(shape))
        count, length, layers = shape
        self.register_buffer("windows", torch.zeros(count, length + 1, dtype=torch.int64))
        self.register_buffer("routes", torch.zeros(count, length, layers, dtype=torch.int64))

    def sizes(self) -> tuple[int | None, int | None]:
        """The routes' length."""
        return self.config["shape"][2], None

    def check(self) -> None:
        """Routes are action codes; see `Router.check`."""
        if not ((self.routes >= 0) & (self.routes < len(ACTIONS))).all():
            raise ValueError(f"routes are codes 0 to {len(ACTIONS) - 1} ({', '.join(ACTIONS)})")

    @classmethod
    def of(cls, windows: Tensor, routes: Tensor) -> ReplayRouter:
        """A router that repeats routes (B, T, L) on windows (B, T+1)."""
        router = cls(routes.shape)
        router.windows, router.routes = windows, routes.to(windows.device)
        return router

    def begin(self, model: DuoForCausalLM, tokens: Tensor) -> None:
        """Check that the pass is over its own windows, all in one batch.

        Raises:
            ValueError: the windows are others.
        """
        self.to(model.device)
        if not torch.equal(self.windows, tokens):
            raise ValueError("routes are replayed on the windows that they were found for, all in one batch")

    def forward(self, hidden: Tensor, layer: int, compute: Tensor) -> Tensor:
        """(B, T), the actions of the given routes; see `Router.forward`."""
        return self.routes[..., layer]


class OracleRouter(Router):
    """Takes each token's best route, found by an exhaustive search in the reference context. It sees the label.

    In the routed context, these routes are not exactly optimal.

    Args:
        price: nats per all-big pass.
        actions: names of the allowed actions.
    """

    def __init__(self, price: float = 0.0, actions: Sequence[str] = ("small", "big")):
        super().__init__(price=check_price(price), actions=list(actions))
        action_ids(actions)
        self._tokens: Tensor | None = None

    def begin(self, model: DuoForCausalLM, tokens: Tensor) -> None:
        """Search the routes of the windows; for the same windows only once."""
        from duorl.oracle import exhaustive

        if self._tokens is None or not torch.equal(self._tokens, tokens):
            table = exhaustive(model, tokens, context="reference", actions=self.config["actions"])
            self.routes = table.routes[table.best(self.config["price"])]  # (B, T, L)
            self._tokens = tokens

    def forward(self, hidden: Tensor, layer: int, compute: Tensor) -> Tensor:
        """(B, T), the actions of the best routes; see `Router.forward`."""
        return self.routes[..., layer]
