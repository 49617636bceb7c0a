"""Intervals, paired tests and frontiers: pure functions.

Ours rather than scipy's: `scipy.stats.bootstrap` draws from one axis, and seeds and windows are two; and neither it nor
`permutation_test` would draw what the kept results were made with.

Conventions: values have shape (W,), one number per window of text, or (S, W) with one row per training seed; a
frontier is `compute` (P,) and `loss` (P,), in any order.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor


def bootstrap_interval(
    values: Tensor, *, resamples: int = 2000, statistic: Callable[[np.ndarray], np.ndarray] | None = None, seed: int = 0
) -> tuple[float, float]:
    """Percentile 95 % interval of a statistic of the mean over seeds and windows.

    Args:
        values: (W,) or (S, W). Windows and, where there are several, seeds are drawn with replacement, independently.
        resamples: number of draws.
        statistic: applied to the resampled means; the mean itself unless given.
        seed: of the draws; the same for all routers, so that intervals are comparable.
    """
    means = _resampled_means(values, resamples, seed)
    low, high = np.percentile(statistic(means) if statistic else means, [2.5, 97.5])
    return float(low), float(high)


def _resampled_means(values: Tensor, resamples: int, seed: int) -> np.ndarray:
    array = np.atleast_2d(values.double().cpu().numpy())
    generator = np.random.default_rng(seed)
    windows = generator.integers(array.shape[1], size=(resamples, array.shape[1]))
    if len(array) == 1:
        return array[0][windows].mean(1)
    seeds = generator.integers(len(array), size=(resamples, len(array)))
    return np.array([array[s][:, w].mean() for s, w in zip(seeds, windows, strict=True)])


def sign_flip_test(differences: Tensor, *, flips: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value of a paired permutation test: were the windows' mean differences as likely of the other sign?

    Args:
        differences: (W,) or (S, W); seeds are averaged first, so that the test is over windows.
        flips: random choices of signs.
        seed: of them.
    """
    means = np.atleast_2d(differences.double().cpu().numpy()).mean(0)
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(flips, len(means)))
    return float((1 + (np.abs(signs @ means) >= abs(means.sum()) * (1 - 1e-12)).sum()) / (flips + 1))


def hypervolume(compute: Tensor, loss: Tensor, *, worst_compute: float = 1.0, worst_loss: float) -> float:
    """Area that a frontier dominates: what a set of trade-offs is worth (Zitzler and Thiele 1999), both axes down.

    Args:
        compute: (P,).
        loss: (P,) nats.
        worst_compute, worst_loss: the corner against which the area is taken; points beyond it add nothing.

    Returns:
        Nats times share of compute.
    """
    area, best = 0.0, worst_loss
    for spent, lost in sorted(zip(compute.tolist(), loss.tolist(), strict=True)):
        if spent < worst_compute and lost < best:
            area += (worst_compute - spent) * (best - lost)
            best = lost
    return area


def interpolate(compute: Tensor, values: Tensor, target: float) -> Tensor | None:
    """A frontier's values at a compute between two of its points: what mixing the two spends and loses.

    Args:
        compute: (P,).
        values: (P, ...), the losses per window, for instance.
        target: compute to interpolate at.

    Returns:
        Shape (...); None where the frontier does not reach the target.
    """
    order = compute.argsort()
    compute, values = compute[order], values[order]
    above = int((compute < target).sum())
    if above == len(compute) or (above == 0 and compute[0] > target + 1e-9):
        return None
    if above == 0:
        return values[0]
    low, high = compute[above - 1], compute[above]
    return values[above - 1].lerp(values[above], ((target - low) / (high - low)).to(values.dtype))


def reaches(compute: Tensor, loss: Tensor, level: float) -> float | None:
    """The least compute at which a frontier's loss, linear between its points, is at or below a level; or None."""
    order = compute.argsort()
    spent, lost = compute[order].tolist(), loss[order].tolist()
    for index, (here, now) in enumerate(zip(spent, lost, strict=True)):
        if now <= level:
            before, then = (spent[index - 1], lost[index - 1]) if index else (here, now)
            return here if then == now else before + (here - before) * (then - level) / (then - now)
    return None
