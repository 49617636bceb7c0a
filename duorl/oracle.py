"""The oracle: exact search over a token's routes (Duo-LLM, arXiv 2410.10846, stage 2).

    table = exhaustive(model, tokens, context="reference", actions=("small", "big"))
    best = table.best(price=0.1)                     # (B, T), indices into table.routes
    table.loss(best).mean(), table.compute[best].mean()

All A^L routes share their prefixes: at layer l there are A^l states per token and each is expanded once,
instead of A^L full passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from duorl.costs import BIG, action_ids
from duorl.models.modeling import DuoForCausalLM
from duorl.routed_pass import RoutedPass, remember

SearchContext = Literal["reference", "uniform"]
_STATES_AT_ONCE = 4096  # token states at the widest level; more memory does not run faster
_MOST_ROUTES = 2**16


@dataclass(frozen=True)
class RouteTable:
    """The loss of every token under every route.

    Attributes:
        routes: (R, L) int64, action codes 0 skip, 1 small, 2 big.
        losses: (B, T, R), nats.
        compute: (R,), in [0, 1].
        context: which keys and values the tokens read: `reference` (an all-big pass's) or `uniform`
            (those of the same route applied to every token).
    """

    routes: Tensor
    losses: Tensor
    compute: Tensor
    context: SearchContext

    def best(self, price: float = 0.0, *, allowed: Tensor | None = None) -> Tensor:
        """Each token's best route: the maximum of gain - price * compute.

        Args:
            price: nats per all-big pass.
            allowed: (R,) bool, the routes to choose among; all unless given.

        Returns:
            Shape (B, T), indices into `routes`.
        """
        cost = self.losses + price * self.compute
        return cost.masked_fill(~self._allowed(allowed), torch.inf).argmin(-1)

    def fixed_ranking(self, price: float = 0.0, *, allowed: Tensor | None = None) -> Tensor:
        """All routes, the best one for all tokens together first: (R,) indices; those not allowed come last."""
        cost = self.losses.mean((0, 1)) + price * self.compute
        return cost.masked_fill(~self._allowed(allowed), torch.inf).argsort()

    def best_fixed(self, price: float = 0.0, *, allowed: Tensor | None = None) -> int:
        """The one route that is best for all tokens together (the paper's best fixed pattern), as an index.

        In the `uniform` context its loss is that of deploying it.
        """
        return int(self.fixed_ranking(price, allowed=allowed)[0])

    def best_of_random(self, count: int, *, generator: torch.Generator, price: float = 0.0) -> Tensor:
        """Each token's best among `count` routes drawn for all tokens (Duo-LLM, Fig. 4a): (B, T) indices."""
        allowed = torch.zeros(len(self.routes), dtype=torch.bool)
        allowed[torch.randperm(len(self.routes), generator=generator)[:count]] = True
        return self.best(price, allowed=allowed.to(self.routes.device))

    def with_big(self, count: int, *, at_most: bool = False) -> Tensor:
        """Which routes have exactly (or at most) `count` big layers: (R,) bool, for `allowed`."""
        big = (self.routes == BIG).sum(1)
        return big <= count if at_most else big == count

    def by_budget(self) -> list[dict[str, float]]:
        """Per possible number of big layers: mean loss and compute of the oracle and of the best fixed route.

        Returns:
            Rows with `big`, `loss`, `compute`, `fixed_loss`, `fixed_compute` (Duo-LLM, Fig. 4b).
        """
        rows = []
        for count in sorted(set((self.routes == BIG).sum(1).tolist())):
            allowed = self.with_big(count)
            best, fixed = self.best(allowed=allowed), self.best_fixed(allowed=allowed)
            rows.append(
                {
                    "big": count,
                    "loss": self.loss(best).mean().item(),
                    "compute": self.compute[best].mean().item(),
                    "fixed_loss": self.losses[..., fixed].mean().item(),
                    "fixed_compute": self.compute[fixed].item(),
                }
            )
        return rows

    def loss(self, index: Tensor) -> Tensor:
        """The losses of chosen routes: index (B, T) into `routes`, result (B, T), nats."""
        return self.losses.gather(-1, index[..., None]).squeeze(-1)

    def index_of(self, routes: Tensor) -> Tensor:
        """Where routes (..., L) stand in the table: (...), int64.

        Raises:
            ValueError: a route is not in the table.
        """
        place = 3 ** torch.arange(self.routes.shape[1], device=routes.device)
        lookup = torch.full((3 ** self.routes.shape[1],), -1, device=routes.device)
        lookup[(self.routes * place).sum(-1)] = torch.arange(len(self.routes), device=routes.device)
        found = lookup[(routes * place).sum(-1)]
        if (found < 0).any():
            raise ValueError("a route takes an action that the table was not searched with")
        return found

    def _allowed(self, allowed: Tensor | None) -> Tensor:
        if allowed is None:
            return torch.ones_like(self.compute, dtype=torch.bool)
        if not allowed.any():
            raise ValueError("no route in the table is allowed")
        return allowed


def count_routes(layers: int, actions: Sequence[str]) -> int:
    """A^L, the routes of an exhaustive search.

    Raises:
        ValueError: unknown action, or more routes than can be searched.
    """
    routes = len(action_ids(actions)) ** layers
    if routes > _MOST_ROUTES:
        raise ValueError(f"{len(actions)} actions in {layers} layers make {routes:.1e} routes, too many to enumerate")
    return routes


@torch.no_grad()
def exhaustive(
    model: DuoForCausalLM,
    tokens: Tensor,
    *,
    context: SearchContext = "reference",
    actions: Sequence[str] = ("small", "big"),
) -> RouteTable:
    """Search all A^L routes of every token.

    Args:
        model: a duo model.
        tokens: (B, T+1) int64 windows.
        context: `reference`: the tokens before read and keep an all-big pass, so that tokens are independent
            and the result is each token's optimum. `uniform`: all tokens of the window take the same route.
        actions: names of the allowed actions.

    Returns:
        A table of R = A^L routes in counting order, the last layer's action varying fastest.

    Raises:
        ValueError: unknown context or action, or too many routes.
    """
    count_routes(model.num_layers, actions)
    tokens = tokens.to(model.device)
    if context not in ("reference", "uniform"):
        raise ValueError(f"unknown context {context!r}: an exhaustive search knows 'reference' and 'uniform'")
    codes = action_ids(actions)
    routes = torch.cartesian_prod(*[codes] * model.num_layers).view(-1, model.num_layers).to(tokens.device)
    losses = [_search_window(model, window[None], codes.tolist(), context) for window in tokens]
    layers = torch.arange(model.num_layers, device=tokens.device)
    compute = model.action_compute[layers, routes].sum(1)
    return RouteTable(routes, torch.cat(losses, dim=1).permute(1, 2, 0), compute, context)


def _search_window(model: DuoForCausalLM, window: Tensor, actions: list[int], context: SearchContext) -> Tensor:
    if context == "reference":
        return _search(RoutedPass(model, window, context="reference", memory=remember(model, window)), actions)
    return _search(RoutedPass(model, window, context="routed"), actions)


def _search(walk: RoutedPass, actions: list[int]) -> Tensor:
    """Losses of all completions of a pass with K branches, (K * rest, B, T): wide while it fits, then depth first."""
    while not walk.done:
        if walk.compute.numel() * len(actions) > _STATES_AT_ONCE:
            return _search_each(walk, actions)
        walk.branch(actions)
    return walk.losses().view(walk.copies, *walk.targets.shape)


def _search_each(walk: RoutedPass, actions: list[int]) -> Tensor:
    parts = []
    for action in actions:
        child = walk.fork()
        child.take(action)
        parts.append(_search(child, actions).view(walk.copies, -1, *walk.targets.shape))
    return torch.stack(parts, dim=1).flatten(0, 2)
