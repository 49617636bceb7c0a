"""The best fixed pattern, one route for all tokens: the baseline of routers.

It is chosen on router text in two rounds: patterns are ranked on few windows, and the best of them are measured again
on more windows. The method says which patterns are ranked: all A^L, or those that a search tries
(`duorl.oracle.patterns`).

    searched = {"method": "greedy", "actions": ("small", "big"), "price": 0.3}
    baseline = Baseline.search(model, training, **searched, options=options)
    baseline.at_price(0.3), baseline.per_big(), baseline.mixed(0.5)

What was searched once for a model and a text is kept (`duorl.evaluation.cache`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duorl.costs import BIG
from duorl.evaluation.cache import cached, keep, kept
from duorl.evaluation.frontier import shares_at
from duorl.evaluation.options import EvaluationOptions
from duorl.models.modeling import DuoForCausalLM
from duorl.oracle import exhaustive
from duorl.oracle.patterns import PatternMethod, Route, pattern_losses, search_patterns, spread
from duorl.routers import MixedRouter, PatternRouter, Router


class Baseline:
    """The fixed patterns of a model, ranked.

    Args:
        model: a duo model.
        training: (W, T+1) of the router split.
        ranked: losses in nats by pattern, on the first `fixed_windows` windows.
        options: it uses `fixed_windows`, `finalists`, `final_windows` and `batch`.
        finals: losses in nats by pattern, on the first `final_windows` windows, as far as they are measured.
        file: keeps all of this; None: nothing is kept.

    Attributes:
        routes: (N, L), the patterns that were ranked.
        losses: (N,), nats on the first `fixed_windows` windows.
        compute: (N,), in [0, 1].
    """

    def __init__(
        self,
        model: DuoForCausalLM,
        training: Tensor,
        ranked: Mapping[Route, float],
        options: EvaluationOptions,
        finals: Mapping[Route, float] | None = None,
        file: Path | None = None,
    ):
        self.model, self.options, self._file = model, options.sized(model.num_layers), file
        self.routes = torch.tensor(list(ranked), device=model.device)
        self.losses = torch.tensor(list(ranked.values()), device=model.device)
        self.compute = model.route_compute(self.routes)
        self._final = training[: self.options.final_windows]
        self._final_losses: dict[Route, float] = dict(finals or {})

    @classmethod
    def search(
        cls,
        model: DuoForCausalLM,
        training: Tensor,
        *,
        method: PatternMethod,
        actions: Sequence[str],
        price: float,
        options: EvaluationOptions,
        tried: Callable[[int], None] = lambda count: None,
    ) -> Baseline:
        """Rank the patterns that a method tries, or take what is kept of such a search.

        Args:
            model: a duo model.
            training: (W, T+1) of the router split.
            method: method that says which patterns are ranked.
            actions: names of the allowed actions.
            price: nats per all-big pass; the greedy search changes the best pattern at this price further.
            options: see `Baseline`.
            tried: called between trials of a search, with the number of patterns so far.

        Raises:
            ValueError: too many routes to enumerate, or too much memory for them.
        """
        sizes = options.sized(model.num_layers)
        counts = {"fixed_windows": sizes.fixed_windows, "final_windows": sizes.final_windows}
        more = {} if method == "enumeration" else {"price": price}
        read = training[: max(counts.values())]
        file = cached("baseline", model, read, method=method, actions=sorted(actions), **counts, **more)
        state = kept(file)
        if isinstance(state, dict) and {"ranked", "finals"} <= state.keys():
            tried(len(state["ranked"]))
            return cls.from_state(state, model, training, sizes, file)
        windows = training[: sizes.fixed_windows]
        if method == "enumeration":
            table = exhaustive(model, windows, context="uniform", actions=actions)
            ranked = dict(zip(map(tuple, table.routes.tolist()), table.losses.mean((0, 1)).tolist(), strict=True))
        else:
            ranked = search_patterns(model, windows, actions=actions, method=method, price=price, tried=tried)
        found = cls(model, training, ranked, sizes, file=file)
        found._keep()
        return found

    def _keep(self) -> None:
        if self._file is not None:
            keep(self._file, self.state())

    def state(self) -> dict[str, Any]:
        """The patterns and their losses as JSON values, for `from_state`."""
        both = {"ranked": self._ranked(), "finals": self._final_losses}
        return {name: [[list(route), loss] for route, loss in losses.items()] for name, losses in both.items()}

    @classmethod
    def from_state(
        cls,
        state: dict[str, Any],
        model: DuoForCausalLM,
        training: Tensor,
        options: EvaluationOptions,
        file: Path | None = None,
    ) -> Baseline:
        """A baseline from `state()`; the other arguments must be those of the first one."""
        losses = {name: {tuple(route): loss for route, loss in pairs} for name, pairs in state.items()}
        return cls(model, training, losses["ranked"], options, losses["finals"], file)

    def _ranked(self) -> dict[Route, float]:
        return dict(zip(map(tuple, self.routes.tolist()), self.losses.tolist(), strict=True))

    def at_price(self, price: float) -> list[int]:
        """The finalist with the smallest loss + price * compute: L action codes."""
        return self._best(self._finalists(price), price)

    def starts(self, price: float) -> list[list[int]]:
        """Patterns from which a descent starts: that at the price, and good ones over the range of compute."""
        return [self.at_price(price), *map(list, spread(self._ranked()))]

    def per_big(self) -> dict[int, list[int]]:
        """The pattern with the smallest loss for each number of big layers that was tried, in rising order."""
        big = (self.routes == BIG).sum(1)
        finalists = {count: self._finalists(0.0, big == count) for count in sorted(set(big.tolist()))}
        self._play_finals([route for group in finalists.values() for route in group])
        return {count: self._best(group, 0.0) for count, group in finalists.items()}

    def final_losses(self, routes: Tensor) -> Tensor:
        """Losses (R,) in nats of patterns (R, L) on the windows of the second round."""
        keys = [tuple(route) for route in routes.tolist()]
        self._play_finals(keys)
        return torch.tensor([self._final_losses[key] for key in keys], dtype=torch.float64)

    def mixed(self, compute: float) -> Router:
        """The best mixture of two of the patterns of `per_big` that spends a compute, on router text.

        Raises:
            ValueError: no pattern spends so little, or so much.
        """
        routes = list(self.per_big().values())
        spent = self.model.route_compute(torch.tensor(routes, device=self.model.device)).double().cpu().numpy()
        losses = self.final_losses(torch.tensor(routes))
        shares = shares_at(spent, losses.numpy(), compute)
        if shares is None:
            raise ValueError(f"fixed patterns spend {spent.min():.3g} to {spent.max():.3g}, not {compute:g}")
        parts = {place: float(share) for place, share in enumerate(shares) if share > 1e-9}
        patterns = [PatternRouter(routes[place]) for place in parts]
        return patterns[0] if len(patterns) == 1 else MixedRouter(patterns, list(parts.values()))

    def _finalists(self, price: float, allowed: Tensor | None = None) -> list[Route]:
        cost = self.losses + price * self.compute
        count = len(cost)
        if allowed is not None:
            cost, count = cost.masked_fill(~allowed, torch.inf), int(allowed.sum())
        best = cost.argsort()[: min(self.options.finalists, count)]
        return [tuple(route) for route in self.routes[best].tolist()]

    def _best(self, finalists: list[Route], price: float) -> list[int]:
        """The finalist with the lowest cost. With few windows only, a pattern could be best by chance."""
        if len(finalists) == 1:
            return list(finalists[0])
        self._play_finals(finalists)
        spent = self.model.route_compute(torch.tensor(finalists, device=self.model.device)).tolist()
        costs = [self._final_losses[route] + price * c for route, c in zip(finalists, spent, strict=True)]
        return list(finalists[costs.index(min(costs))])

    def _play_finals(self, routes: list[Route]) -> None:
        """Measure the patterns that are not measured yet, together; shared prefixes run once."""
        if new := [route for route in dict.fromkeys(routes) if route not in self._final_losses]:
            losses = pattern_losses(self.model, self._final, torch.tensor(new), batch=self.options.batch)
            self._final_losses |= zip(new, losses.tolist(), strict=True)
            self._keep()
