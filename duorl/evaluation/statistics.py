"""Estimates with intervals and tests, and frontiers: pure functions.

An estimate varies with the seeds of the learners and with the files of the text. Windows of one file are similar, so a
whole file is left out at a time. The jackknife gives a variance for the seeds and one for the files. The interval adds
both, each with the t quantile of its own degrees of freedom. `python -m benchmarks.coverage` shows how often such
intervals contain the true value; docs/explanation/intervals.md has the table.

    loss = estimate(losses, files)              # (S, W), (W,)
    loss.value, loss.interval
    difference = loss - estimate(rivals, files)  # paired
    difference.interval, difference.p

Conventions: values have shape (W,), one number per window of text, or (S, W) with one row per training seed; a
frontier is `compute` (P,) and `loss` (P,), in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import stdtrit
from torch import Tensor

Statistic = Callable[[np.ndarray], float]
Frontier = np.ndarray | Tensor
_LEAST_P = 1e-15


@dataclass(frozen=True)
class Estimate:
    """A statistic, averaged over seeds, with its variance.

    Attributes:
        seeds: values of the seeds, (S,), for each independent group of seeds; the estimate is the sum of the groups'
            means.
        without: (F,), the estimate without each one of the files; empty if there is only one file.
        freedom: degrees of freedom of the files' variance.
    """

    seeds: tuple[np.ndarray, ...]
    without: np.ndarray
    freedom: float

    @property
    def value(self) -> float:
        """The estimate."""
        return float(sum(group.mean() for group in self.seeds))

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % confidence interval, value -+ sqrt(sum of (t * standard error)^2); None with one seed and one window.

        Banerjee (1960), Approximate confidence interval for linear functions of means of k populations: for
        normal effects, it covers at least 95 %, for any ratio of the variances. With one seed, the interval is about
        this router on other files. With several seeds, it is about the learner on other files.
        """
        if not self.errors:
            return None
        half = _half_width(self.errors, 0.05)
        return self.value - half, self.value + half

    @property
    def p(self) -> float:
        """Two-sided p-value of an estimate of 0: one minus the confidence of the interval that ends at 0."""
        errors = self.errors
        if self.value == 0 or not any(variance for variance, _ in errors):
            return 1.0 if self.value == 0 or not errors else _LEAST_P
        beyond = lambda log: _half_width(errors, np.exp(log)) - abs(self.value)  # noqa: E731
        least = np.log(_LEAST_P)
        return _LEAST_P if beyond(least) <= 0 else float(np.exp(brentq(beyond, least, 0.0, xtol=1e-6)))

    def __sub__(self, rival: Estimate) -> Estimate:
        """The paired difference on the same windows. Files are left out of both; equal numbers of seeds are paired."""
        without = self.without - rival.without
        if len(self.seeds) == len(rival.seeds) == 1:
            own, other = self.seeds[0], rival.seeds[0]
            if len(own) == len(other) or 1 in (len(own), len(other)):
                return Estimate((own - other,), without, self.freedom)
        return Estimate((*self.seeds, *(-group for group in rival.seeds)), without, self.freedom)

    @property
    def errors(self) -> list[tuple[float, float]]:
        """Variance and degrees of freedom of each group of seeds and of the files."""
        found = [(group.var(ddof=1) / len(group), len(group) - 1.0) for group in self.seeds if len(group) > 1]
        if count := len(self.without):
            found.append(((count - 1) / count * np.square(self.without - self.value).sum(), self.freedom))
        return found


def _half_width(errors: Sequence[tuple[float, float]], level: float) -> float:
    return float(np.sqrt(sum(stdtrit(freedom, level / 2) ** 2 * variance for variance, freedom in errors)))


def estimate(values: Tensor, files: Tensor | None = None, *, statistic: Statistic | None = None) -> Estimate:
    """A mean over windows and seeds, or a statistic of several means, with its variance.

    The files' variance is the jackknife's: MacKinnon, Nielsen and Webb (2023), Fast and reliable jackknife and
    bootstrap methods for cluster-robust inference. Its degrees of freedom are Kish's effective number of files, minus
    1: files of very different length count for less than their number.

    Args:
        values: (W,) or (S, W); with a statistic (S, C, W), C numbers per window.
        files: (W,), file of each window. Without it, or if all windows are from one file, each window is its own file.
        statistic: a function of the means over windows, (C,); it is averaged over seeds. By default, the only column.
    """
    array = values.double().cpu().numpy()
    array = array if statistic else np.atleast_2d(array)[:, None]
    sums, counts = _by_file(array, files)  # (S, C, F), (F,)
    means = array.mean(-1)[None]
    if len(counts) > 1:
        without = (sums.sum(-1, keepdims=True) - sums) / (counts.sum() - counts)
        means = np.concatenate([means, np.moveaxis(without, -1, 0)])  # (1 + F, S, C)
    found = np.apply_along_axis(statistic, -1, means) if statistic else means[..., 0]
    freedom = counts.sum() ** 2 / np.square(counts).sum() - 1
    return Estimate((found[0],), found[1:].mean(1), max(1.0, float(freedom)))


def named(name: str, found: Estimate | None, scale: Callable[[float], float] = float) -> dict[str, Any]:
    """A value and its interval for JSON, `NAME` and `NAME_interval`, both on a rising scale; without a value, None."""
    if found is None:
        return {name: None, f"{name}_interval": None}
    interval = found.interval and tuple(map(scale, found.interval))
    return {name: scale(found.value), f"{name}_interval": interval}


def as_share(value: float) -> float:
    """A scale for `named`: a share is in [0, 1], so an interval ends there too."""
    return min(max(float(value), 0.0), 1.0)


def drift(new: Estimate, old: Estimate) -> dict[str, Any]:
    """`drift`, an estimate on one text minus the same on another, with its interval; seeds are paired.

    The files are others, so the variances over files add.
    """
    change = new.seeds[0] - old.seeds[0]
    errors = Estimate((change,), np.empty(0), 1.0).errors + [one.errors[-1] for one in (new, old) if len(one.without)]
    half = _half_width(errors, 0.05)
    value = float(change.mean())
    return {"drift": value, "drift_interval": (value - half, value + half) if errors else None}


def _by_file(array: np.ndarray, files: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """Sums over the windows of each file, (..., W) to (..., F), and their numbers (F,)."""
    names, place = np.unique(np.arange(array.shape[-1]) if files is None else files.cpu().numpy(), return_inverse=True)
    if len(names) in (1, array.shape[-1]):
        return array, np.ones(array.shape[-1])
    order = place.argsort(kind="stable")
    counts = np.bincount(place)
    return np.add.reduceat(array[..., order], np.r_[0, counts.cumsum()[:-1]], axis=-1), counts


def holm(p: Sequence[float], level: float = 0.05) -> list[bool]:
    """Which of several tests hold, so that the probability of any false one stays below a level.

    Holm (1979), A simple sequentially rejective multiple test procedure: the smallest p is compared with level / m,
    the next with level / (m - 1), and so on until one fails.
    """
    holds = [False] * len(p)
    for rank, index in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        if p[index] > level / (len(p) - rank):
            break
        holds[index] = True
    return holds


def hypervolume(compute: Frontier, loss: Frontier, *, worst_compute: float = 1.0, worst_loss: float) -> float:
    """Area that a frontier dominates (Zitzler and Thiele 1999); smaller is better on both axes.

    Args:
        compute: (P,).
        loss: (P,) nats.
        worst_compute, worst_loss: the corner of the area; points beyond it add nothing.

    Returns:
        Nats times share of compute.
    """
    area, best = 0.0, worst_loss
    for spent, lost in sorted(zip(compute.tolist(), loss.tolist(), strict=True)):
        if spent < worst_compute and lost < best:
            area += (worst_compute - spent) * (best - lost)
            best = lost
    return area


def reaches(compute: Tensor, loss: Tensor, level: float) -> float | None:
    """The smallest compute at which a frontier's loss, linear between its points, is at or below a level; or None."""
    order = compute.argsort()
    spent, lost = compute[order].tolist(), loss[order].tolist()
    for index, (here, now) in enumerate(zip(spent, lost, strict=True)):
        if now <= level:
            before, then = (spent[index - 1], lost[index - 1]) if index else (here, now)
            return here if then == now else before + (here - before) * (then - level) / (then - now)
    return None
