"""The best fixed pattern, one route for all tokens: by enumeration, dynamic programming or greedy search.

The dynamic program follows AmoebaLLM (2024). S[l][k] is the best pattern with k big layers among the first l and small
ones after them. It is the better of S[l-1][k] and S[l-1][k-1] with layer l big. It tries L (L + 1) / 2 patterns in
place of 2^L. The greedy search orders the layers by the change of the loss if only this layer changes, and improves the
best pattern of every budget by swaps. It tries in the order of L patterns. docs/explanation/oracle.md compares them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import Literal, get_args

import torch
from torch import Tensor

from duorl.closeness import Closeness
from duorl.costs import BIG, action_ids
from duorl.models.modeling import DuoForCausalLM
from duorl.oracle.search import all_routes, completion_flops, count_routes, tree_flops
from duorl.routed_pass import RoutedPass, along

Budget = tuple[int, ...]
"""Number of layers with each allowed action, in the order of codes: (6, 2) is six small and two big."""
Route = tuple[int, ...]
PatternMethod = Literal["enumeration", "program", "greedy"]
STARTS = 12


@dataclass(frozen=True)
class FixedPattern:
    """One route for all tokens.

    Attributes:
        budget: number of layers with each allowed action, cheapest action first.
        route: L action codes.
        loss: mean loss in nats of all tokens on this route, over the windows on which it was chosen; or minus the
            closeness to all-big by which it was chosen.
        compute: in [0, 1].
    """

    budget: Budget
    route: list[int]
    loss: float
    compute: float


def pattern_losses(
    model: DuoForCausalLM, windows: Tensor, routes: Tensor, *, batch: int = 16, closeness: Closeness | None = None
) -> Tensor:
    """Mean loss in nats of each pattern in the `uniform` context, (R,); see `window_losses`."""
    return window_losses(model, windows, routes, batch=batch, closeness=closeness).mean(1)


@torch.no_grad()
def window_losses(
    model: DuoForCausalLM, windows: Tensor, routes: Tensor, *, batch: int = 16, closeness: Closeness | None = None
) -> Tensor:
    """Mean loss in nats of each window on each pattern, (R, W). Shared prefixes are computed once.

    Args:
        model: a duo model.
        windows: (W, T+1).
        routes: (R, L), action codes.
        batch: windows per pass.
        closeness: of `duorl.closeness`; minus the closeness to all-big then takes the place of the loss.
    """
    found = []
    for tokens in windows.to(model.device).split(batch):
        losses = torch.zeros(len(routes), len(tokens), dtype=torch.float64)
        start = RoutedPass(model, tokens)
        teacher = closeness and start.fork().take_all(BIG)
        for index, done in along(start, routes):
            lowered = -done.compare(teacher, closeness) if closeness and teacher else done.losses()
            losses[index.cpu()] = lowered.mean(1).double().cpu()
        found.append(losses)
    return torch.cat(found, 1)


def fixed_patterns(
    model: DuoForCausalLM,
    windows: Tensor,
    *,
    actions: Sequence[str] = ("small", "big"),
    method: PatternMethod = "enumeration",
    closeness: Closeness | None = None,
) -> list[FixedPattern]:
    """The best pattern for every budget that was tried, cheapest first.

    Args:
        model: a duo model.
        windows: (W, T+1), the text on which the patterns are chosen.
        actions: names of the allowed actions.
        method: `enumeration` tries all A^L patterns and is exact. The dynamic `program` and the `greedy` search work
            for any depth. With more than two actions, `greedy` does not try every budget.
        closeness: see `pattern_losses`; the patterns of drafts, for example, are the best by `same_token`.

    Raises:
        ValueError: too many routes to enumerate, or an unknown method.
    """
    codes = action_ids(actions).tolist()
    if method == "enumeration":
        routes = all_routes(model.num_layers, actions)
        losses = pattern_losses(model, windows, routes, closeness=closeness).tolist()
        tried = dict(zip(map(tuple, routes.tolist()), losses, strict=True))
    else:
        tried = search_patterns(model, windows, actions=actions, method=method, closeness=closeness)
    best = _best_per_budget(codes, tried)
    compute = model.route_compute(torch.tensor(list(best.values()), device=model.device)).tolist()
    patterns = [
        FixedPattern(budget, list(route), tried[route], spent)
        for (budget, route), spent in zip(best.items(), compute, strict=True)
    ]
    return sorted(patterns, key=lambda pattern: pattern.compute)


def search_patterns(
    model: DuoForCausalLM,
    windows: Tensor,
    *,
    actions: Sequence[str],
    method: PatternMethod,
    price: float = 0.0,
    closeness: Closeness | None = None,
    tried: Callable[[int], None] = lambda count: None,
) -> dict[Route, float]:
    """All patterns that `program` or `greedy` tries, and their losses in nats on the windows.

    Args:
        model: a duo model.
        windows: (W, T+1).
        actions: names of the allowed actions.
        method: `program` or `greedy`.
        price: nats per all-big pass; the greedy search changes the best pattern at this price further.
        closeness: see `pattern_losses`.
        tried: called between trials, with the number of patterns so far.

    Raises:
        ValueError: an unknown method.
    """
    if method not in ("program", "greedy"):
        raise ValueError(f"unknown method {method!r}: choose {', '.join(get_args(PatternMethod))}")
    trials = _Trials(model, windows, tried, closeness)
    codes = action_ids(actions).tolist()
    if len(codes) == 1:
        trials.losses([tuple(codes) * model.num_layers])
    elif method == "program":
        _program(trials, codes)
    else:
        _Greedy(trials, codes).search(price)
    return trials.found


def spread(tried: Mapping[Route, float]) -> list[Route]:
    """The best patterns of at most `STARTS` numbers of big layers, from which a descent can start.

    Args:
        tried: losses in nats by pattern.
    """
    best: dict[int, Route] = {}
    for route in sorted(tried, key=tried.__getitem__):
        best.setdefault(route.count(BIG), route)
    step = -(-len(best) // STARTS)
    return [best[count] for count in sorted(best)[::step]]


def pattern_count(layers: int, actions: Sequence[str], method: PatternMethod) -> int:
    """Maximum number of patterns that a method tries.

    Raises:
        ValueError: an unknown action, or too many routes to enumerate.
    """
    if method == "enumeration":
        return count_routes(layers, actions)
    dearer = len(action_ids(actions)) - 1
    if method == "program":  # there are C(l + A - 1, A - 1) budgets before layer l
        return 1 + dearer * sum(comb(layer + dearer, dearer) for layer in range(layers))
    return 2 + _SWEEPS * layers * dearer + _greedy_others(layers, dearer)


def _greedy_others(layers: int, dearer: int) -> int:
    """Number of patterns of the greedy search that come from chains and swaps, not from single changes."""
    chains = _ORDERS * (layers + (layers * dearer * (dearer + 1) // 2 if dearer > 1 else 0))
    return chains + 2 * (1 + _LEAST) * _MOST * (layers - 1)


def patterns_flops(model: DuoForCausalLM, actions: Sequence[str], positions: float, method: PatternMethod) -> float:
    """Approximate FLOPs of one token on all patterns that a method tries.

    Args:
        model: a duo model.
        actions: names of the allowed actions.
        positions: number of positions that the token attends to.
        method: see `pattern_count`.
    """
    layers, dearer = model.num_layers, len(action_ids(actions)) - 1
    if method != "greedy" or not dearer:
        return tree_flops(model, actions, positions, routes=pattern_count(layers, actions, method))
    changes = _SWEEPS * dearer * sum(completion_flops(model, actions, positions))  # they share the layers before
    others = max(1, _greedy_others(layers, dearer) // 2)  # about half of them were tried before
    return changes + tree_flops(model, actions, positions, routes=others)


class _Trials:
    """The patterns that were tried, each one once."""

    def __init__(
        self, model: DuoForCausalLM, windows: Tensor, tried: Callable[[int], None], closeness: Closeness | None
    ):
        self.model, self.windows, self.tried, self.closeness = model, windows, tried, closeness
        self.found: dict[Route, float] = {}

    def losses(self, routes: Iterable[Route]) -> list[float]:
        routes = list(routes)
        if new := [list(route) for route in dict.fromkeys(routes) if route not in self.found]:
            self.found |= zip(map(tuple, new), self._losses(new), strict=True)
            self.tried(len(self.found))
        return [self.found[route] for route in routes]

    def _losses(self, routes: list[list[int]]) -> list[float]:
        return pattern_losses(self.model, self.windows, torch.tensor(routes), closeness=self.closeness).tolist()


def _best_per_budget(codes: list[int], tried: dict[Route, float]) -> dict[Budget, Route]:
    best: dict[Budget, Route] = {}
    for route, loss in tried.items():
        budget = tuple(route.count(code) for code in codes)
        if budget not in best or loss < tried[best[budget]]:
            best[budget] = route
    return best


def _changed(route: Route, layer: int, code: int) -> Route:
    return (*route[:layer], code, *route[layer + 1 :])


def _program(trials: _Trials, codes: list[int]) -> None:
    cheapest, *dearer = codes
    layers = trials.model.num_layers
    best = [(cheapest,) * layers]
    trials.losses(best)
    for layer in range(layers):
        routes = best + [_changed(route, layer, code) for route in best for code in dearer]
        losses = trials.losses(routes)
        best = list(_best_per_budget(codes, dict(zip(routes, losses, strict=True))).values())


_MOST, _LEAST = 3, 2  # layers that the greedy search tries to change in one pattern; to swap out
_ROUNDS = 2  # of single changes of the best pattern
_MIDDLE = (1 / 3, 2 / 3)  # shares of dearest layers at which damages are measured again
_ORDERS = 2 + len(_MIDDLE)
_SWEEPS = _ORDERS + _ROUNDS  # over all layers, one changed at a time


class _Greedy:
    """The greedy search: orders layers by their damage, from four patterns; then improves the best of every budget."""

    def __init__(self, trials: _Trials, codes: list[int]):
        self.trials, self.codes = trials, codes
        self.layers = trials.model.num_layers
        self.spent = trials.model.flops.compute[:, codes].double()  # (L, A)
        self.damages: dict[int, Tensor] = {}  # per number of dearest layers, (L, A)

    def search(self, price: float) -> None:
        """Try the patterns; the results are in `trials`."""
        for count in (0, self.layers):
            self._order((self.codes[-1] if count else self.codes[0],) * self.layers)
        for share in _MIDDLE:
            self._order(self._best()[round(share * self.layers)])
        self._walk(-1)
        self._walk(1)
        self._refine(price)

    def _order(self, base: Route) -> None:
        """Measure the damages at a pattern, and try the patterns that follow from their order."""
        damage = self._damage(base)
        self.damages[base.count(self.codes[-1])] = damage
        if base == (self.codes[0],) * self.layers:
            base = tuple(self._others(damage))
        self.trials.losses(self._chain(base, damage))
        if len(self.codes) > 2:
            self.trials.losses(self._hull(damage))

    def _damage(self, base: Route) -> Tensor:
        """Change of the loss if one layer takes another action, (L, A)."""
        routes = [_changed(base, layer, code) for layer in range(self.layers) for code in self.codes]
        losses = torch.tensor(self.trials.losses([base, *routes]), dtype=torch.float64)
        return (losses[1:] - losses[0]).view(self.layers, -1)

    def _damage_near(self, count: int) -> Tensor:
        """The damages for a number of dearest layers, interpolated between those that were measured, (L, A)."""
        low = max(known for known in self.damages if known <= count)
        high = min(known for known in self.damages if known >= count)
        share = (count - low) / (high - low) if high > low else 0.0
        return self.damages[low].lerp(self.damages[high], share)

    def _others(self, damage: Tensor) -> list[int]:
        """The best action of each layer but the dearest, L codes."""
        return [self.codes[index] for index in damage[:, :-1].argmin(1).tolist()]

    def _split(self, route: Route, damage: Tensor) -> tuple[list[int], list[int]]:
        """Layers with the dearest action, those that need it least first; and the others, in the same order."""
        need = damage[:, :-1].min(1).values - damage[:, -1]
        order = need.argsort().tolist()
        inside = [layer for layer in order if route[layer] == self.codes[-1]]
        return inside, [layer for layer in order if route[layer] != self.codes[-1]]

    def _chain(self, base: Route, damage: Tensor) -> list[Route]:
        """Take the dearest action from layer after layer of the base, and give it to layer after layer."""
        inside, outside = self._split(base, damage)
        others, down, up = self._others(damage), [base], [base]
        for layer in inside:
            down.append(_changed(down[-1], layer, others[layer]))
        for layer in reversed(outside):
            up.append(_changed(up[-1], layer, self.codes[-1]))
        return down + up

    def _hull(self, damage: Tensor) -> list[Route]:
        """The best patterns at all prices, from the highest to 0, if the damages of layers added up."""
        loss, spent = damage[:, :, None] - damage[:, None], self.spent[:, None] - self.spent[:, :, None]
        slopes = (loss / spent)[(loss > 0) & (spent > 0)].sort(descending=True).values
        prices = [slopes[:1] * 2, (slopes[:-1] + slopes[1:]) / 2, slopes[-1:] / 2]
        choices = [(damage + price * self.spent).argmin(1).tolist() for price in torch.cat(prices).tolist()]
        return list(dict.fromkeys(tuple(self.codes[index] for index in choice) for choice in choices))

    def _best(self) -> dict[int, Route]:
        """The best pattern per number of dearest layers."""
        best: dict[int, Route] = {}
        for route, loss in self.trials.found.items():
            count = route.count(self.codes[-1])
            if count not in best or loss < self.trials.found[best[count]]:
                best[count] = route
        return best

    def _walk(self, step: int) -> None:
        """Improve the best pattern of every number of dearest layers, upwards (1) or downwards (-1)."""
        for count in range(1, self.layers)[::step]:
            self.trials.losses(self._changes(count - step, step))
            self.trials.losses(self._swaps(count))

    def _changes(self, count: int, step: int) -> list[Route]:
        """The best pattern with a number of dearest layers, with one more or less."""
        best, inside, outside, others = self._at(count)
        if step > 0:
            return [_changed(best, layer, self.codes[-1]) for layer in outside]
        return [_changed(best, layer, others[layer]) for layer in inside]

    def _swaps(self, count: int) -> list[Route]:
        """The best pattern with a number of dearest layers, in which two layers exchange their actions."""
        best, inside, outside, _ = self._at(count)
        pairs = [(out, into) for out in inside[:_LEAST] for into in outside]
        return [_changed(_changed(best, into, self.codes[-1]), out, best[into]) for out, into in pairs]

    def _at(self, count: int) -> tuple[Route, list[int], list[int], list[int]]:
        """The best pattern, layers inside with the least need, layers outside with the most, and the other actions."""
        best, damage = self._best()[count], self._damage_near(count)
        inside, outside = self._split(best, damage)
        return best, inside[:_MOST], outside[: -_MOST - 1 : -1], self._others(damage)

    def _refine(self, price: float) -> None:
        """Change single layers of the best pattern at the price, while this improves it."""
        tried, before = self.trials.found, None
        for _ in range(_ROUNDS):
            best = min(tried, key=lambda route: tried[route] + price * self._compute(route))
            if best == before:
                break
            before = best
            self.trials.losses(_changed(best, layer, code) for layer in range(self.layers) for code in self.codes)

    def _compute(self, route: Route) -> float:
        return sum(self.spent[layer, self.codes.index(code)].item() for layer, code in enumerate(route))
