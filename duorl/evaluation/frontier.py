"""Frontier: what can be reached by mixing the steps of a ladder.

A router is measured at several budgets: these measurements are its `Ladder`. A deployment can draw one of two routers
for each window, and so spends and loses any mean of the two. So whatever lies on the lower convex hull of a ladder can
be had (Provost and Fawcett 2001, Robust classification for imprecise environments, do this with classifiers). "At
equal compute" always means: on this hull, for every router, the fixed patterns too.

Which steps are mixed is decided by the losses on router text. The frontier is then that of these steps on the measured
text. Their shares are set by the compute alone, which needs no labels, so that all routers spend exactly the same.

    frontier = Frontier([Ladder.climb(model, steps, windows, router_text) for steps in routers_of_seeds], files)
    frontier.at(0.5).value, frontier.at(0.5).interval
    (frontier.at(0.5) - rival.at(0.5)).interval          # paired
    frontier.area(worst), frontier.reaches(level)

Conventions of the pure functions: a ladder has `compute` (P,) and `value` (P,), lower is better, steps in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from duorl.evaluation.measure import Measurement, measure, stacked, top1_agreement
from duorl.evaluation.statistics import Chosen, Estimate, estimate, estimates
from duorl.models.modeling import DuoForCausalLM
from duorl.routers import ConstantRouter, Router

Goal = Literal["losses", "top1_agreement"]
_SIGN = {"losses": 1.0, "top1_agreement": -1.0}  # so that lower is better
_ROUNDED = 1e-6  # compute is a sum of floats
_GRID = 101  # computes at which a frontier is compared with a level


def lower_hull(compute: np.ndarray, value: np.ndarray) -> np.ndarray:
    """The steps on the lower convex hull of a ladder, from the cheapest one to the best one: (V,) indices.

    Beyond the best step the hull would rise again. Nobody has to spend so much, so it ends there.
    """
    hull: list[int] = []
    for step in np.lexsort((value, compute)):  # Andrew 1979: the steps from left to right, without turns to the right
        if hull and value[step] >= value[hull[-1]]:
            continue
        while len(hull) > 1 and _is_above(hull[-1], hull[-2], step, compute, value):
            hull.pop()
        hull.append(int(step))
    return np.array(hull)


def _is_above(middle: int, left: int, right: int, compute: np.ndarray, value: np.ndarray) -> bool:
    """Whether a step is on or above the line between two others."""
    rise = (value[right] - value[left]) * (compute[middle] - compute[left])
    return bool((value[middle] - value[left]) * (compute[right] - compute[left]) >= rise)


def shares_at(compute: np.ndarray, value: np.ndarray, target: float) -> np.ndarray | None:
    """Shares (P,) of the steps of the hull that spend a target, or less where less is best; None: out of reach."""
    if not compute.min() - _ROUNDED <= target <= compute.max() + _ROUNDED:
        return None
    hull = lower_hull(compute, value)
    shares = np.zeros(len(compute))
    for place, step in enumerate(hull):  # the hat functions of linear interpolation
        shares[step] = np.interp(target, compute[hull], np.eye(len(hull))[place])
    return shares


def best_at(compute: np.ndarray, value: np.ndarray, target: float) -> float:
    """The value of the hull at a compute; beyond its ends, that of the end."""
    hull = lower_hull(compute, value)
    return float(np.interp(target, compute[hull], value[hull]))


def hypervolume(compute: np.ndarray, value: np.ndarray, worst: float) -> float:
    """Area between the hull of a ladder and two lines, compute 1 and the worst value (Zitzler and Thiele 1999).

    Returns:
        Unit of the value times share of compute; it is larger if the frontier is better.
    """
    hull = lower_hull(compute, value)
    return _area_above(compute[hull], value[hull], worst)


def _area_above(compute: np.ndarray, value: np.ndarray, worst: float) -> float:
    """Area between a line from left to right and the worst value, up to compute 1, where the line is below it."""
    spent = np.append(np.minimum(compute, 1.0), 1.0)
    gained = worst - np.append(value, value[-1])
    left, right, width = gained[:-1], gained[1:], np.diff(spent)
    high, low = np.maximum(left, right), np.minimum(left, right)
    crossing = np.divide(high**2, 2 * (high - low), where=high > low, out=np.zeros_like(high))  # a triangle
    parts = np.where(low >= 0, (left + right) / 2, np.where(high <= 0, 0.0, crossing))
    return float((parts * width).sum())


@dataclass(frozen=True)
class Ladder:
    """One router at several budgets, in the routed context.

    Attributes:
        spent: (P, W), mean compute of each window at each step, in [0, 1].
        losses: (P, W), nats per token, the mean of each window.
        top1_agreement: (P, W), share of tokens whose most likely next token is all-big's; None: not measured.
        seconds: (P, N), wall time per token of each batch; None: not measured.
        own_flops: (P, 1), FLOPs per token of the router's own decisions; None: not known.
        chosen: the same router on router text, which decides which steps are mixed; None: they are decided on the
            measured text itself, which is only fair where each step stands for itself.
    """

    spent: Tensor
    losses: Tensor
    top1_agreement: Tensor | None = None
    seconds: Tensor | None = None
    own_flops: Tensor | None = None
    chosen: Ladder | None = None

    @classmethod
    def climb(
        cls,
        model: DuoForCausalLM,
        steps: Sequence[Router],
        windows: Tensor,
        router_text: Tensor | None = None,
        between: Callable[[], None] = lambda: None,
    ) -> Ladder:
        """Measure routers, one per step, on windows (W, T+1) and on router text (W', T+1).

        `between` is called after each measurement.
        """

        def measured_on(router: Router) -> Measurement:
            found = measure(model, router, windows)
            between()
            return found

        all_big = measured_on(ConstantRouter("big")).predicted
        measured = stacked([measured_on(router) for router in steps])
        return cls(
            spent=measured.compute.mean(-1),
            losses=measured.loss.mean(-1),
            top1_agreement=top1_agreement(measured.predicted, all_big),
            seconds=measured.seconds,
            own_flops=torch.tensor([[router.flops()] for router in steps]),
            chosen=None if router_text is None else cls.climb(model, steps, router_text, between=between),
        )

    @property
    def compute(self) -> Tensor:
        """(P,), means over windows."""
        return self.spent.mean(1)

    @property
    def loss(self) -> Tensor:
        """(P,) nats, means over windows."""
        return self.losses.mean(1)

    def tensors(self) -> dict[str, Tensor]:
        """What is measured, by name."""
        own = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "chosen"}
        more = {f"chosen.{name}": values for name, values in self.chosen.tensors().items()} if self.chosen else {}
        return {name: values for name, values in own.items() if values is not None} | more

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Ladder:
        """The ladder of `tensors`."""
        chosen = {name.removeprefix("chosen."): x for name, x in tensors.items() if name.startswith("chosen.")}
        own = {name: values for name, values in tensors.items() if "." not in name}
        return cls(**own, chosen=cls.of(chosen) if chosen else None)

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        save_file(self.tensors(), path)

    @classmethod
    def load(cls, path: Path) -> Ladder:
        """Load a ladder."""
        return cls.of(load_file(path))


Ladders = Mapping[str, Sequence[Ladder]]
"""For each router, one ladder per training seed."""


class Reach(NamedTuple):
    """Where a frontier reaches a level.

    Attributes:
        compute: the smallest compute at which the mean is at or below the level; None: nowhere.
        interval: the computes at which 95 % intervals of the difference to the level leave open whether it is reached:
            from the first one that does not exclude it to the first one that shows it, None where none shows it. None:
            there are no intervals.
    """

    compute: float | None
    interval: tuple[float | None, float | None] | None


class Frontier:
    """What can be reached by mixing the steps of a router's ladders.

    Estimates are means over training seeds, each seed with its own mixture. Their intervals contain the chance of the
    seeds, of the measured files, and of the choice of the steps by the files of the router text.

    Args:
        seeds: one ladder per training seed.
        files: (W,), file of each measured window.
        chosen_files: (W',), file of each window of the router text.
        goal: what the mixture is chosen for.
    """

    def __init__(
        self,
        seeds: Sequence[Ladder],
        files: Tensor | None = None,
        chosen_files: Tensor | None = None,
        goal: Goal = "losses",
    ):
        self.seeds, self.files, self.chosen_files, self.goal = list(seeds), files, chosen_files, goal

    @property
    def range(self) -> tuple[float, float]:
        """The least and the most compute that all seeds can spend."""
        ends = [(ladder.compute.min().item(), ladder.compute.max().item()) for ladder in self.seeds]
        return max(low for low, _ in ends), min(high for _, high in ends)

    def spends(self, compute: float) -> bool:
        """Whether all seeds can spend so much and so little."""
        low, high = self.range
        return low - _ROUNDED <= compute <= high + _ROUNDED

    def at(self, compute: float, of: str | None = None, scale: Callable[[float], float] = float) -> Estimate | None:
        """The goal at a compute, or another column of the ladders for the same mixture, on a scale.

        Returns:
            None if a seed does not reach the compute, or the column is not measured.
        """
        if not self.spends(compute) or any(getattr(ladder, of or self.goal) is None for ladder in self.seeds):
            return None
        (found,) = self._estimates(lambda spent, values: scale(np.interp(compute, spent, values)), of=of)
        return found

    def line(self) -> list[tuple[float, float]]:
        """Compute and goal along the frontier, means over seeds, at all places where it can bend."""
        low, high = self.range
        spent = torch.cat([ladder.compute for ladder in self.seeds]).double().numpy()
        grid = np.unique(np.clip(spent, low, max(low, high)))
        found = self._estimates(lambda spent, values: np.interp(grid, spent, values))
        return [(float(compute), each.value) for compute, each in zip(grid, found, strict=True)]

    def area(self, worst: Tensor) -> Estimate:
        """The hypervolume: the area between the frontier, compute 1 and the mean of the worst values (W,)."""
        sign = _SIGN[self.goal]
        (found,) = self._estimates(lambda spent, goal, mean: _area_above(spent, sign * goal, sign * mean), worst)
        return found

    def reaches(self, level: Tensor) -> Reach:
        """Where the frontier reaches the mean of a level (W,), which is measured on the same windows."""
        sign, (low, high) = _SIGN[self.goal], self.range
        grid = np.linspace(low, max(low, high), _GRID)
        found = self._estimates(lambda spent, goal, mean: sign * (np.interp(grid, spent, goal) - mean), level)
        values = np.array([each.value for each in found])
        compute = _first_at(grid, values)
        if not found[0].errors:
            return Reach(compute, None)
        ends = np.array([each.interval for each in found])
        return Reach(compute, (_first_at(grid, ends[:, 0]), _first_at(grid, ends[:, 1])))

    def excess(self, losses: Tensor, spent: Tensor) -> Estimate | None:
        """What another router loses more than this frontier at the compute of that router; for the goal `losses`.

        Args:
            losses: (S, W) nats, of its seeds.
            spent: (S, W), their compute.

        Returns:
            The paired difference; None if the frontier does not reach the compute.
        """
        if not all(map(self.spends, spent.mean(1).tolist())):
            return None
        (found,) = self._estimates(lambda own, goal, loss, at: loss - np.interp(at, own, goal), losses, spent)
        return found

    def steps(self) -> list[tuple[float, Estimate]]:
        """Mean compute and goal of each step, cheapest first, whether it is mixed or not."""
        compute, goals = (self._stacked(name) for name in ("spent", self.goal))  # (S, P, W)
        means = compute.mean((0, 2))
        order = means.argsort(stable=True).tolist()
        return [(means[step].item(), estimate(goals[:, step], self.files)) for step in order]

    def _estimates(
        self, statistic: Callable[..., float | np.ndarray], *more: Tensor, of: str | None = None
    ) -> list[Estimate]:
        """A statistic of the hull's compute and values (V,), from the left, and of the means of more columns.

        Args:
            statistic: see above.
            more: (W,) or (S, W) each.
            of: the column of the values; by default the goal.
        """
        spent, goal, values = (self._stacked(name) for name in ("spent", self.goal, of or self.goal))
        chosen = self._chosen()
        files = self.files
        if values.shape[-1] != spent.shape[-1]:  # batches in place of windows: compute and choice are known numbers
            known = (columns.mean(-1, keepdim=True) for columns in (spent, goal))
            spent, goal = (means.expand_as(values) for means in known)
            chosen, files = chosen and (chosen[0].mean(-1, keepdim=True), None), None
        parts = [spent, goal, values, *(torch.atleast_2d(column.to(spent))[:, None] for column in more)]
        seeds, n, sign = max(map(len, parts)), spent.shape[1], _SIGN[self.goal]
        columns = torch.cat([part.expand(seeds, -1, -1) for part in parts], 1)
        chosen = chosen and (chosen[0].expand(seeds, -1, -1), chosen[1])

        def of_means(means: np.ndarray, by: np.ndarray | None = None) -> float | np.ndarray:
            by = means if by is None else by
            hull = lower_hull(by[:n], sign * by[n : 2 * n])
            hull = hull[means[hull].argsort(kind="stable")]  # on another text, steps may change places
            return statistic(means[hull], means[2 * n + hull], *means[3 * n :])

        return estimates(columns, files, statistic=of_means, chosen=chosen)

    def _chosen(self) -> Chosen | None:
        """Compute and goal of all steps on the router text, (S, 2 P, W'), and its files; None without it."""
        ladders = [ladder.chosen for ladder in self.seeds if ladder.chosen is not None]
        if len(ladders) < len(self.seeds):
            return None
        own = Frontier(ladders, goal=self.goal)
        return torch.cat([own._stacked("spent"), own._stacked(self.goal)], 1), self.chosen_files

    def _stacked(self, name: str) -> Tensor:
        """A column of all seeds, (S, P, W). A last step stands again where a seed has fewer; that changes no hull."""
        columns = [getattr(ladder, name) for ladder in self.seeds]
        count = max(map(len, columns))
        return torch.stack([values[torch.arange(count).clamp(max=len(values) - 1)] for values in columns])


def _first_at(grid: np.ndarray, values: np.ndarray) -> float | None:
    """The first place where values on a grid, linear between its points, are 0 or below; None: nowhere."""
    below = np.flatnonzero(values <= _ROUNDED)
    if not len(below):
        return None
    first = int(below[0])
    if first == 0 or values[first] > 0:
        return float(grid[first])
    return float(np.interp(0.0, [values[first], values[first - 1]], [grid[first], grid[first - 1]]))
