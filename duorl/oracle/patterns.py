"""The best fixed pattern, one route for all tokens, for every budget: by enumeration, or by dynamic programming.

The program follows AmoebaLLM (2024): S[l][k], the best pattern with k big layers among the first l and small ones after
them, is the better of S[l-1][k] and S[l-1][k-1] with layer l big. It tries L (L + 1) / 2 patterns in place of 2^L.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from duorl.costs import action_ids
from duorl.models.modeling import DuoForCausalLM
from duorl.oracle.search import all_routes, route_compute
from duorl.routed_pass import RoutedPass, along

Budget = tuple[int, ...]
"""Layers per action, by code of the allowed actions: (6, 2) is six small and two big."""


@dataclass(frozen=True)
class FixedPattern:
    """One route for all tokens.

    Attributes:
        budget: number of layers with each allowed action, cheapest first.
        route: L action codes.
        loss: mean in nats over the windows it was chosen on, every token routed so.
        compute: in [0, 1].
    """

    budget: Budget
    route: list[int]
    loss: float
    compute: float


@torch.no_grad()
def pattern_losses(model: DuoForCausalLM, windows: Tensor, routes: Tensor, *, batch: int = 16) -> Tensor:
    """Mean loss in nats of deploying each pattern, (R,): the `uniform` context, shared prefixes walked once.

    Args:
        model: a duo model.
        windows: (W, T+1).
        routes: (R, L), action codes.
        batch: windows per pass.
    """
    total = torch.zeros(len(routes), dtype=torch.float64)
    for tokens in windows.to(model.device).split(batch):
        for index, done in along(RoutedPass(model, tokens), routes):
            total[index] += done.losses().sum().item()
    return total / windows[:, 1:].numel()


def fixed_patterns(
    model: DuoForCausalLM,
    windows: Tensor,
    *,
    actions: Sequence[str] = ("small", "big"),
    method: Literal["enumeration", "program"] = "enumeration",
) -> list[FixedPattern]:
    """The best pattern for every budget, the cheapest first.

    Args:
        model: a duo model.
        windows: (W, T+1), the text to choose them on.
        actions: names of the allowed actions.
        method: `enumeration` of all A^L, exact; or the dynamic `program`, which works for any depth.

    Raises:
        ValueError: too many routes to enumerate, or an unknown method.
    """
    codes = action_ids(actions).tolist()
    if method == "enumeration":
        routes = all_routes(model.num_layers, actions)
        found = _best_per_budget(codes, routes.tolist(), pattern_losses(model, windows, routes).tolist())
    elif method == "program":
        found = _program(model, windows, codes)
    else:
        raise ValueError(f"unknown method {method!r}: choose enumeration or program")
    compute = route_compute(model, torch.tensor([route for route, _ in found.values()], device=model.device)).tolist()
    patterns = [
        FixedPattern(budget, list(route), loss, spent)
        for (budget, (route, loss)), spent in zip(found.items(), compute, strict=True)
    ]
    return sorted(patterns, key=lambda pattern: pattern.compute)


_Best = dict[Budget, tuple[Sequence[int], float]]


def _best_per_budget(codes: list[int], routes: Sequence[Sequence[int]], losses: Sequence[float]) -> _Best:
    best: _Best = {}
    for route, loss in zip(routes, losses, strict=True):
        budget = tuple(list(route).count(code) for code in codes)
        if budget not in best or loss < best[budget][1]:
            best[budget] = (route, loss)
    return best


def _program(model: DuoForCausalLM, windows: Tensor, codes: list[int]) -> _Best:
    cheapest, *dearer = codes
    start = [cheapest] * model.num_layers
    best: _Best = {tuple([model.num_layers] + [0] * len(dearer)): (start, _losses(model, windows, [start])[0])}
    for layer in range(model.num_layers):
        changed = [[*route[:layer], code, *route[layer + 1 :]] for route, _ in best.values() for code in dearer]
        unchanged = list(best.values())
        routes = [route for route, _ in unchanged] + changed
        losses = [loss for _, loss in unchanged] + _losses(model, windows, changed)
        best = _best_per_budget(codes, routes, losses)
    return best


def _losses(model: DuoForCausalLM, windows: Tensor, routes: list[list[int]]) -> list[float]:
    return pattern_losses(model, windows, torch.tensor(routes)).tolist()
