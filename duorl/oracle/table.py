"""RouteTable: the loss of every token under every route, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from duorl.costs import BIG

SearchContext = Literal["reference", "uniform", "routed"]


@dataclass(frozen=True)
class RouteTable:
    """The loss of every token under every route.

    Attributes:
        routes: (R, L) int64, action codes 0 skip, 1 small, 2 big.
        losses: (B, T, R), nats.
        compute: (R,), in [0, 1].
        context: which keys and values the tokens read, see `exhaustive`.
        flops: what the search executed; the all-big pass that a token reads is not in it.
        committed: (B, T) indices into `routes`, in the `routed` context the routes whose keys and values later tokens
            read; the losses are those given these routes. None in the others.
    """

    routes: Tensor
    losses: Tensor
    compute: Tensor
    context: SearchContext
    flops: float = 0.0
    committed: Tensor | None = None

    def best(self, price: float = 0.0, *, allowed: Tensor | None = None) -> Tensor:
        """Each token's best route: the maximum of gain - price * compute.

        Args:
            price: nats per all-big pass.
            allowed: bool, the routes to choose among, (R,), or (T, R) for a budget that changes along the sequence;
                all unless given. See `with_big`, `within`.

        Returns:
            Shape (B, T), indices into `routes`.

        Raises:
            ValueError: somewhere no route is allowed.
        """
        return torch.cat([cheapest(losses + price * self.compute, allowed) for losses in self.losses.split(1)])

    def fixed_ranking(self, price: float = 0.0, *, allowed: Tensor | None = None) -> Tensor:
        """All routes, the best one for all tokens together first: (R,) indices; those not allowed come last.

        Raises:
            ValueError: a budget that changes along the sequence, (T, R), which no fixed route can keep.
        """
        if allowed is not None and allowed.ndim > 1:
            raise ValueError("one route for all tokens has one budget: give `allowed` of shape (R,)")
        return _among(self.losses.mean((0, 1)) + price * self.compute, allowed).argsort()

    def best_fixed(self, price: float = 0.0, *, allowed: Tensor | None = None) -> int:
        """The one route that is best for all tokens together (the paper's best fixed pattern), as an index.

        In the `uniform` context its loss is that of deploying it.
        """
        return int(self.fixed_ranking(price, allowed=allowed)[0])

    def best_of_random(
        self, count: int, *, generator: torch.Generator, price: float = 0.0, allowed: Tensor | None = None
    ) -> Tensor:
        """Each token's best among `count` routes drawn for all tokens (Duo-LLM, Fig. 4a), out of those allowed, (R,).

        Returns:
            Shape (B, T), indices into `routes`.
        """
        place = torch.arange(len(self.routes)) if allowed is None else allowed.cpu().nonzero()[:, 0]
        drawn = torch.zeros(len(self.routes), dtype=torch.bool)
        drawn[place[torch.randperm(len(place), generator=generator)[:count]]] = True
        return self.best(price, allowed=drawn.to(self.routes.device))

    def with_big(self, count: int | Tensor, *, at_most: bool = False) -> Tensor:
        """Which routes have exactly (or at most) `count` big layers, for `allowed`.

        Args:
            count: a number, or (T,), one per position: a budget that falls or rises along the sequence (Fig. 4c).
            at_most: allow fewer.

        Returns:
            Bool, (R,), or (T, R) for (T,).
        """
        big = (self.routes == BIG).sum(1)
        count = _per_position(count).to(big.device)
        return big <= count if at_most else big == count

    def within(self, compute: float | Tensor) -> Tensor:
        """Which routes spend at most `compute`, a number or (T,), in [0, 1]: bool, (R,) or (T, R), for `allowed`."""
        return self.compute <= _per_position(compute).to(self.compute.device) + 1e-6  # compute is a sum of floats

    def frontier(self) -> Frontier:
        """The least mean loss at every mean compute: each token chooses at a common price, for all prices at once.

        A token's choices as the price falls are the corners of the lower convex hull of its (compute, loss) points;
        between two corners the price equals the slope. Sorting all tokens' slopes gives the curve of means.
        """
        levels, group = self.compute.double().mul(1e6).round().unique(return_inverse=True)  # equal up to rounding
        levels = levels / 1e6
        least = self.losses.new_full((*self.losses.shape[:2], len(levels)), torch.inf)
        for window, losses in zip(least, self.losses, strict=True):  # no second table beside this one
            window.scatter_reduce_(1, group.expand_as(losses), losses, "amin")
        return _frontier_of(levels.cpu(), least.flatten(0, 1).double().cpu())

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
        routes = routes.to(self.routes.device)
        place = 3 ** torch.arange(self.routes.shape[1], device=routes.device)
        ordered, order = (self.routes * place).sum(-1).sort()
        found = order[torch.searchsorted(ordered, (routes * place).sum(-1)).clamp(max=len(order) - 1)]
        if not torch.equal(self.routes[found], routes):
            raise ValueError("a route takes an action that the table was not searched with")
        return found


@dataclass(frozen=True)
class Frontier:
    """A convex curve of mean loss against mean compute, from the cheapest routes to the best at any cost.

    Attributes:
        price: (M,), falling: point i is optimal for prices from `price[i]` (the first: from infinity) down to the next.
        compute: (M,), rising, in [0, 1].
        loss: (M,), falling, nats.
    """

    price: Tensor
    compute: Tensor
    loss: Tensor


def _frontier_of(levels: Tensor, least: Tensor) -> Frontier:
    """Levels (C,) of compute, and each token's least loss at each, (N, C)."""
    corner = least.argmin(1)  # walk down each token's hull from its best point; all tokens at once
    slopes, saved, lost = [], [], []
    while (corner > 0).any():
        here = least.gather(1, corner[:, None])
        cheaper = torch.arange(len(levels)) < corner[:, None]
        slope = (least - here) / (levels[corner][:, None] - levels).clamp(min=1e-12)
        slope = slope.masked_fill(~cheaper, torch.inf)
        steepest, following = slope.min(1)
        moving = corner > 0
        slopes.append(steepest[moving])
        saved.append((levels[corner] - levels[following])[moving])
        lost.append((least.gather(1, following[:, None]) - here)[moving, 0])
        corner = torch.where(moving, following, corner)
    return _sorted_frontier(levels, least, slopes, saved, lost)


def _sorted_frontier(
    levels: Tensor, least: Tensor, slopes: list[Tensor], saved: list[Tensor], lost: list[Tensor]
) -> Frontier:
    count = len(least)
    price = torch.cat([*slopes, torch.zeros(0).double()])
    order = price.argsort(descending=True)
    gained_compute = torch.cat([*saved, torch.zeros(0).double()])[order].cumsum(0) / count
    gained_loss = torch.cat([*lost, torch.zeros(0).double()])[order].cumsum(0) / count
    first_compute, first_loss = levels[:1], least[:, 0].mean()[None]
    return Frontier(
        price=torch.cat([torch.tensor([torch.inf]).double(), price[order]]),
        compute=torch.cat([first_compute, first_compute + gained_compute]),
        loss=torch.cat([first_loss, first_loss - gained_loss]),
    )


def _per_position(limit: float | Tensor) -> Tensor:
    """A number as it is; one per position, (T,), as (T, 1), to be compared with (R,)."""
    limit = torch.as_tensor(limit)
    return limit[..., None] if limit.ndim else limit


def cheapest(cost: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Index of the least cost (..., R) among the allowed, (R,) or (T, R): (...)."""
    return _among(cost, allowed).argmin(-1)


def _among(cost: Tensor, allowed: Tensor | None) -> Tensor:
    if allowed is None:
        return cost
    if not allowed.any(-1).all():
        raise ValueError("no route in the table is allowed")
    return cost.masked_fill(~allowed, torch.inf)
