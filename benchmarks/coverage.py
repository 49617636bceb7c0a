"""How often a 95 % interval contains the true value: the table of docs/explanation/intervals.md.

    python -m benchmarks.coverage --draws 2000

A made-up loss is the sum of an effect of its seed, of its file, of its seed on this file, of its window, and a rest.
The sizes of these effects are those of real runs, and larger ones (see `SPREADS`); files have the lengths of the
evaluation split. Three ways to an interval see the same losses. A cell has the share of intervals that hold the true
value, with normal and with skewed effects, and their mean width with normal ones, in nats.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from duorl.evaluation.frontier import hypervolume
from duorl.evaluation.statistics import Estimate, estimate

SEEDS = (1, 2, 3, 5)
WINDOWS, FILES = 192, 60
STEPS, LOSSES = np.array([0.1, 0.3, 0.5, 0.7]), np.array([2.8, 2.6, 2.58, 2.5])  # of a frontier
TURNS = np.array([0.5, 1.0, -1.0, 1.0])
Interval = tuple[float, float]


class Spread(NamedTuple):
    """Standard deviations in nats: of seeds, files, seeds on one file, windows, and the rest."""

    seed: float
    file: float
    seed_on_file: float
    window: float
    rest: float


SPREADS = {
    # duo-tiny, 192 windows of both texts, 5 trainings of ReinMax and 4 of REINFORCE, 300,000 decisions each
    "loss": Spread(0.0034, 0.22, 0.007, 0.47, 0.029),
    "ReinMax minus fixed": Spread(0.0034, 0.0, 0.007, 0.037, 0.029),
    "REINFORCE minus fixed": Spread(0.0107, 0.0106, 0.0, 0.032, 0.035),
    # larger than those
    "files alone": Spread(0.0, 0.02, 0.0, 0.037, 0.029),
    "seeds above all": Spread(0.03, 0.01, 0.007, 0.037, 0.029),
}


def draw(generator: np.random.Generator, spread: Spread, seeds: int, *, skewed: bool) -> tuple[Tensor, Tensor]:
    """Random losses (S, W) with mean 0 over all seeds and files, and the file of each window, (W,)."""
    shares = np.exp(1.3 * stats.norm.ppf((np.arange(FILES) + 0.5) / FILES))
    lengths = generator.multinomial(WINDOWS, shares / shares.sum())
    files = np.repeat(np.arange(FILES), lengths)
    effects = partial(_effects, generator, skewed)
    losses = spread.seed * effects(seeds, 1) + spread.file * effects(1, FILES)[:, files]
    losses = losses + spread.seed_on_file * effects(seeds, FILES)[:, files] + spread.window * effects(1, WINDOWS)
    return torch.from_numpy(losses + spread.rest * effects(seeds, WINDOWS)), torch.from_numpy(files)


def _effects(generator: np.random.Generator, skewed: bool, *shape: int) -> np.ndarray:
    return _standard(generator.standard_normal(shape), skewed)


def _standard(normal: np.ndarray, skewed: bool) -> np.ndarray:
    """Random effects with mean 0 and variance 1; skewed: log-normal with skewness 1.75."""
    return (np.exp(0.5 * normal) - np.exp(0.125)) / np.sqrt((np.exp(0.25) - 1) * np.exp(0.25)) if skewed else normal


def percentile_bootstrap(losses: Tensor, generator: np.random.Generator, resamples: int = 400) -> Interval:
    """Windows and seeds drawn with replacement, independently of each other and of the files."""
    seeds, windows = losses.shape
    drawn = [generator.multinomial(n, np.full(n, 1 / n), size=resamples) / n for n in (seeds, windows)]
    means = np.einsum("rs,sw,rw->r", drawn[0], losses.numpy(), drawn[1], optimize=True)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def satterthwaite(found: Estimate) -> Interval:
    """The same variances, with one t quantile of degrees of freedom that are estimated too (Satterthwaite 1946)."""
    errors = found.errors
    total = sum(variance for variance, _ in errors)
    freedom = total**2 / sum(variance**2 / freedom for variance, freedom in errors)
    half = stats.t.isf(0.025, freedom) * total**0.5
    return found.value - half, found.value + half


def area(means: np.ndarray) -> float:
    """The hypervolume of a frontier whose shape changes with the mean effect."""
    return hypervolume(STEPS, LOSSES + TURNS * means[0], worst=3.0)


def true_area(spread: Spread, *, skewed: bool) -> float:
    """Its mean over seeds and files."""
    quantiles = stats.norm.ppf((np.arange(2000) + 0.5) / 2000)
    return float(np.mean([area([spread.seed * effect]) for effect in _standard(quantiles, skewed)]))


def covered(spread: Spread, seeds: int, draws: int, *, skewed: bool) -> np.ndarray:
    """For each method, (M, 2): share of intervals that contain the true value, and mean width."""
    generator, found = np.random.default_rng(seeds), []
    truths = (0.0, 0.0, 0.0, true_area(spread, skewed=skewed))
    for _ in range(draws):
        losses, files = draw(generator, spread, seeds, skewed=skewed)
        mean = estimate(losses, files)
        volume = estimate(losses[:, None], files, statistic=area)
        intervals = [percentile_bootstrap(losses, generator), satterthwaite(mean), mean.interval, volume.interval]
        found.append([(low <= true <= high, high - low) for (low, high), true in zip(intervals, truths, strict=True)])
    return np.mean(found, axis=0)


METHODS = ("percentile bootstrap", "Satterthwaite", "used", "used, hypervolume")


def markdown(draws: int) -> str:
    """The table. With one seed, the interval is about this one router."""
    lines = [f"| effects | seeds | {' | '.join(METHODS)} |", f"| --- | ---: |{' ---: |' * len(METHODS)}"]
    for name, spread in SPREADS.items():
        for seeds in SEEDS:
            one = spread._replace(seed=0.0, seed_on_file=0.0) if seeds == 1 else spread
            normal, skewed = (covered(one, seeds, draws, skewed=skewed) for skewed in (False, True))
            shares = zip(100 * normal[:, 0], 100 * skewed[:, 0], normal[:, 1], strict=True)
            cells = [f"{these:.0f} / {those:.0f} %, {width:.3f}" for these, those, width in shares]
            lines.append(f"| {name} | {seeds} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Simulate, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=2000, help="simulated experiments per line")
    print(markdown(parser.parse_args().draws))


if __name__ == "__main__":
    main()
