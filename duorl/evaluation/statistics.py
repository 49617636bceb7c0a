"""Estimates with intervals and tests: pure functions.

An estimate varies with the seeds of the learners and with the files of the text. Windows of one file are similar, so a
whole file is left out at a time. The jackknife gives a variance for the seeds and one for the files. The interval adds
both, each with the t quantile of its own degrees of freedom. `python -m benchmarks.coverage` shows how often such
intervals contain the true value; docs/explanation/intervals.md has the table.

    loss = estimate(losses, files)              # (S, W), (W,)
    loss.value, loss.interval
    difference = loss - estimate(rivals, files)  # paired
    difference.interval, difference.p

Conventions: values have shape (W,), one number per window of text, or (S, W) with one row per training seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import stdtrit
from torch import Tensor

Statistic = Callable[..., float]
Chosen = tuple[Tensor, Tensor | None]
"""A text by which a statistic chooses: values (S, C', W') and the file of each window, (W',)."""
_LEAST_P = 1e-15


class Jackknife(NamedTuple):
    """An estimate without each of the F files of a text.

    Attributes:
        without: (F,), the estimate without each one of the files; empty if there is only one file.
        freedom: degrees of freedom of the files' variance.
    """

    without: np.ndarray
    freedom: float


@dataclass(frozen=True)
class Estimate:
    """A statistic, averaged over seeds, with its variance.

    Attributes:
        seeds: values of the seeds, (S,), for each independent group of seeds; the estimate is the sum of the groups'
            means.
        texts: for the text that was measured, and for that by which the statistic chooses, if it does.
    """

    seeds: tuple[np.ndarray, ...]
    texts: tuple[Jackknife, ...]

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
        pairs = zip_longest(self.texts, rival.texts)  # one of them may choose nothing
        texts = tuple(_difference(own, other, self.value, rival.value) for own, other in pairs)
        if len(self.seeds) == len(rival.seeds) == 1:
            own, other = self.seeds[0], rival.seeds[0]
            if len(own) == len(other) or 1 in (len(own), len(other)):
                return Estimate((own - other,), texts)
        return Estimate((*self.seeds, *(-rival).seeds), texts)

    def __neg__(self) -> Estimate:
        """The same with the other sign."""
        texts = tuple(Jackknife(-text.without, text.freedom) for text in self.texts)
        return Estimate(tuple(-group for group in self.seeds), texts)

    @property
    def errors(self) -> list[tuple[float, float]]:
        """Variance and degrees of freedom of each group of seeds and of each text's files."""
        seeds = [(group.var(ddof=1) / len(group), len(group) - 1.0) for group in self.seeds if len(group) > 1]
        return seeds + self.file_errors

    @property
    def file_errors(self) -> list[tuple[float, float]]:
        """Those of the files alone."""
        texts = [(each, len(each.without)) for each in self.texts if len(each.without)]
        return [((n - 1) / n * np.square(each.without - self.value).sum(), each.freedom) for each, n in texts]


def _difference(own: Jackknife | None, rival: Jackknife | None, value: float, rivals: float) -> Jackknife:
    """Of two estimates, with their values; without one of them, that is its value, whichever file is left out."""
    known = own or rival
    assert known is not None
    without = np.asarray(own.without if own else value) - (rival.without if rival else rivals)
    return Jackknife(without, known.freedom)


def _half_width(errors: Sequence[tuple[float, float]], level: float) -> float:
    return float(np.sqrt(sum(stdtrit(freedom, level / 2) ** 2 * variance for variance, freedom in errors)))


def estimate(
    values: Tensor,
    files: Tensor | None = None,
    *,
    statistic: Statistic | None = None,
    chosen: Chosen | None = None,
) -> Estimate:
    """A mean over windows and seeds, or a statistic of several means, with its variance.

    The files' variance is the jackknife's: MacKinnon, Nielsen and Webb (2023), Fast and reliable jackknife and
    bootstrap methods for cluster-robust inference. Its degrees of freedom are Kish's effective number of files, minus
    1: files of very different length count for less than their number.

    Args:
        values: (W,) or (S, W); with a statistic (S, C, W), C numbers per window.
        files: (W,), file of each window. Without it, or if all windows are from one file, each window is its own file.
        statistic: a function of the means over windows, (C,); it is averaged over seeds. By default, the only column.
        chosen: another text, by which the statistic chooses. It is then a function of both texts' means, (C,) and
            (C',), and the files of both are left out, one at a time.
    """
    array = values if statistic else torch.atleast_2d(values)[:, None]
    (found,) = estimates(array, files, statistic=statistic or _first, chosen=chosen)
    return found


def _first(means: np.ndarray) -> float:
    return float(means[0])


def estimates(
    values: Tensor,
    files: Tensor | None = None,
    *,
    statistic: Callable[..., float | np.ndarray],
    chosen: Chosen | None = None,
) -> list[Estimate]:
    """Several numbers of one statistic, which returns a vector; see `estimate`."""
    texts = [_left_out(values, files), *([] if chosen is None else [_left_out(*chosen)])]
    wholes = [means[0] for means, _ in texts]  # (S, C) each

    def apply(columns: Sequence[np.ndarray]) -> np.ndarray:
        return np.array([np.atleast_1d(statistic(*means)) for means in zip(*columns, strict=True)])  # (S, K)

    seeds = apply(wholes)
    without = [
        np.array([apply([*wholes[:place], left, *wholes[place + 1 :]]).mean(0) for left in means[1:]])
        for place, (means, _) in enumerate(texts)
    ]
    freedoms = [freedom for _, freedom in texts]
    return [
        Estimate(
            (seeds[:, k],),
            tuple(Jackknife(x[:, k] if len(x) else x, f) for x, f in zip(without, freedoms, strict=True)),
        )
        for k in range(seeds.shape[1])
    ]


def _left_out(values: Tensor, files: Tensor | None) -> tuple[np.ndarray, float]:
    """The means of values (S, C, W) over all windows, and without each file, (1 + F, S, C); degrees of freedom."""
    array = values.double().cpu().numpy()
    sums, counts = _by_file(array, files)  # (S, C, F), (F,)
    means = array.mean(-1)[None]
    if len(counts) > 1:
        without = (sums.sum(-1, keepdims=True) - sums) / (counts.sum() - counts)
        means = np.concatenate([means, np.moveaxis(without, -1, 0)])
    return means, max(1.0, float(counts.sum() ** 2 / np.square(counts).sum() - 1))


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
    errors = Estimate((change,), ()).errors + new.file_errors + old.file_errors
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
