"""RouteTable: the loss of every token under every route, and the choice of routes from it."""

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
        flops: FLOPs of the search, without the all-big pass whose keys and values the tokens read.
        committed: (B, T) indices into `routes`: in the `routed` context, the routes whose keys and values later tokens
            read. The losses hold for these routes. None in the other contexts.
    """

    routes: Tensor
    losses: Tensor
    compute: Tensor
    context: SearchContext
    flops: float = 0.0
    committed: Tensor | None = None

    def best(self, price: float = 0.0, *, allowed: Tensor | None = None) -> Tensor:
        """Choose the best route of each token: the maximum of gain - price * compute.

        Args:
            price: nats per all-big pass.
            allowed: bool, the routes to choose from: (R,), or (T, R) for a budget that changes along the sequence. By
                default all. See `with_big`, `within`.

        Returns:
            Shape (B, T), indices into `routes`.

        Raises:
            ValueError: for some position no route is allowed.
        """
        return torch.cat([cheapest(losses + price * self.compute, allowed) for losses in self.losses.split(1)])

    def fixed_ranking(self, price: float = 0.0, *, allowed: Tensor | None = None) -> Tensor:
        """Sort all routes by their mean return over all tokens, best first: (R,) indices. Forbidden routes are last.

        Raises:
            ValueError: `allowed` has shape (T, R); a fixed route cannot keep a budget that changes along the sequence.
        """
        if allowed is not None and allowed.ndim > 1:
            raise ValueError("one route for all tokens has one budget: give `allowed` of shape (R,)")
        return _among(self.losses.mean((0, 1)) + price * self.compute, allowed).argsort()

    def best_fixed(self, price: float = 0.0, *, allowed: Tensor | None = None) -> int:
        """Index of the route with the best mean return over all tokens (the paper's best fixed pattern).

        In the `uniform` context, its loss is that in deployment.
        """
        return int(self.fixed_ranking(price, allowed=allowed)[0])

    def best_of_random(
        self, count: int, *, generator: torch.Generator, price: float = 0.0, allowed: Tensor | None = None
    ) -> Tensor:
        """Best of `count` random allowed routes for each token; all tokens try the same (Duo-LLM, Fig. 4a).

        Returns:
            Shape (B, T), indices into `routes`.
        """
        place = torch.arange(len(self.routes)) if allowed is None else allowed.cpu().nonzero()[:, 0]
        drawn = torch.zeros(len(self.routes), dtype=torch.bool)
        drawn[place[torch.randperm(len(place), generator=generator)[:count]]] = True
        return self.best(price, allowed=drawn.to(self.routes.device))

    def with_big(self, count: int | Tensor, *, at_most: bool = False) -> Tensor:
        """Which routes have exactly (or at most) `count` big layers; to be used as `allowed`.

        Args:
            count: a number, or (T,), one per position: a budget that falls or rises along the sequence (Fig. 4c).
            at_most: also allow fewer.

        Returns:
            Bool, (R,), or (T, R) for (T,).
        """
        big = (self.routes == BIG).sum(1)
        count = _per_position(count).to(big.device)
        return big <= count if at_most else big == count

    def within(self, compute: float | Tensor) -> Tensor:
        """Which routes have at most `compute`, a number or (T,), in [0, 1]; bool (R,) or (T, R), for `allowed`."""
        return self.compute <= _per_position(compute).to(self.compute.device) + 1e-6  # compute is a sum of floats

    def frontier(self) -> Frontier:
        """The smallest mean loss at every mean compute: each token chooses its best route at each price.

        As the price falls, a token's choices are the corners of the lower convex hull of its (compute, loss) points.
        Between two corners, the price equals the slope. The sorted slopes of all tokens give the curve of means.
        """
        levels, group = self.compute.double().mul(1e6).round().unique(return_inverse=True)  # equal up to rounding
        levels = levels / 1e6
        least = self.losses.new_full((*self.losses.shape[:2], len(levels)), torch.inf)
        for window, losses in zip(least, self.losses, strict=True):  # no second table beside this one
            window.scatter_reduce_(1, group.expand_as(losses), losses, "amin")
        return _frontier_of(levels.cpu(), least.flatten(0, 1).double().cpu())

    def by_budget(self) -> list[dict[str, float]]:
        """For each number of big layers: mean loss and compute of the oracle and of the best fixed route.

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
        """Losses of chosen routes: from indices (B, T) into `routes` to (B, T) nats."""
        return self.losses.gather(-1, index[..., None]).squeeze(-1)

    def index_of(self, routes: Tensor) -> Tensor:
        """Indices of routes (..., L) in the table: (...), int64.

        Raises:
            ValueError: a route is not in the table.
        """
        routes = routes.to(self.routes.device)
        place = 3 ** torch.arange(self.routes.shape[1], device=routes.device)
        ordered, order = (self.routes * place).sum(-1).sort()
        found = order[torch.searchsorted(ordered, (routes * place).sum(-1)).clamp(max=len(order) - 1)]
        if not torch.equal(self.routes[found], routes):
            raise ValueError("a route has an action that this table was not searched with")
        return found


@dataclass(frozen=True)
class Frontier:
    """A convex curve of mean loss against mean compute, from the cheapest routes to those with the lowest loss.

    Attributes:
        price: (M,), falling: point i is optimal for prices from `price[i]` (infinity for the first) down to the next.
        compute: (M,), rising, in [0, 1].
        loss: (M,), falling, nats.
    """

    price: Tensor
    compute: Tensor
    loss: Tensor


def _frontier_of(levels: Tensor, least: Tensor) -> Frontier:
    """The frontier from levels of compute (C,) and the smallest loss of each token at each level (N, C)."""
    corner = least.argmin(1)  # follow each token's hull from its best point; all tokens in parallel
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
    """Shape a limit for comparison with (R,): a number stays a number, (T,) becomes (T, 1)."""
    limit = torch.as_tensor(limit)
    return limit[..., None] if limit.ndim else limit


def cheapest(cost: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Index of the smallest cost (..., R) among the allowed routes, (R,) or (T, R): (...)."""
    return _among(cost, allowed).argmin(-1)


def _among(cost: Tensor, allowed: Tensor | None) -> Tensor:
    if allowed is None:
        return cost
    if not allowed.any(-1).all():
        raise ValueError("no route in the table is allowed")
    return cost.masked_fill(~allowed, torch.inf)
