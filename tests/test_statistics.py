"""Intervals and tests against closed forms and naive computation."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks.coverage import Spread, draw
from duorl.evaluation.budgets import minus
from duorl.evaluation.statistics import as_share, estimate, holm, named
from duorl.prices import ladder


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def half_width(found) -> float:
    low, high = found.interval
    assert (low + high) / 2 == pytest.approx(found.value)
    return (high - low) / 2


def test_windows_alone_or_seeds_alone_give_students_interval():
    windows = noise(40) + 0.3
    closed = stats.ttest_1samp(windows.numpy(), 0)
    assert estimate(windows).interval == pytest.approx(tuple(closed.confidence_interval(0.95)))
    assert estimate(windows).p == pytest.approx(closed.pvalue, rel=1e-4)
    seeds = torch.tensor([1.0, 2.0, 4.0])
    closed = stats.ttest_1samp(seeds.numpy(), 0)
    for values in (seeds[:, None].expand(3, 7), seeds[:, None]):  # of one window nothing is known but its seeds
        assert estimate(values).interval == pytest.approx(tuple(closed.confidence_interval(0.95)))
        assert estimate(values).p == pytest.approx(closed.pvalue, rel=1e-4)
    assert estimate(seeds[:1]).interval is None and estimate(seeds[:1]).p == 1.0


def test_the_widths_of_seeds_and_files_are_added_as_squares():
    seeds, windows = noise(4), noise(30, seed=1)
    both = estimate(seeds[:, None] + windows)
    expected = np.hypot(half_width(estimate(seeds[:, None].expand(4, 30))), half_width(estimate(windows)))
    assert half_width(both) == pytest.approx(expected)
    for level in (0.9, both.p):  # the interval of confidence 1 - p ends at 0
        parts = [stats.t.isf(level / 2, n - 1) * v.std().item() / n**0.5 for n, v in ((4, seeds), (30, windows))]
        assert (np.hypot(*parts) == pytest.approx(abs(both.value), rel=1e-4)) == (level == both.p)


def test_files_are_left_out_as_a_whole():
    """Against a naive jackknife of a ratio, which is not linear, over files of different length."""
    files = torch.tensor([7, 7, 2, 2, 2, 5, 7, 9])
    values = noise(2, 2, 8) + 5
    ratio = lambda means: means[0] / means[1]  # noqa: E731
    found = estimate(values, files, statistic=ratio)
    whole = [ratio(seed.mean(1)).item() for seed in values]
    left = [np.mean([ratio(seed[:, files != file].mean(1)).item() for seed in values]) for file in (2, 5, 7, 9)]
    assert found.value == pytest.approx(np.mean(whole)) and found.texts[0].without == pytest.approx(left)
    variance = 3 / 4 * sum((one - np.mean(whole)) ** 2 for one in left)
    freedom = 8**2 / (3**2 + 1 + 3**2 + 1) - 1
    seeds = stats.t.isf(0.025, 1) * np.std(whole, ddof=1) / 2**0.5
    assert half_width(found) == pytest.approx(np.hypot(seeds, stats.t.isf(0.025, freedom) * variance**0.5))
    assert estimate(values[0], torch.zeros(8)).interval == estimate(values[0]).interval  # of one file: its windows


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("spread", [Spread(0.01, 0.01, 0.0, 0.03, 0.03), Spread(0.0, 0.02, 0.005, 0.04, 0.03)])
def test_intervals_cover_as_often_as_they_say(spread, seeds):
    """With few seeds that differ, and with files that differ, where a bootstrap covers 70 to 89 %."""
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        values, files = draw(generator, spread, seeds, skewed=False)
        low, high = estimate(values, files).interval
        hits += low <= 0 <= high
    assert hits / 400 > 0.93


def test_seeds_are_paired_or_spread_apart():
    own, rival = noise(3, 20), noise(3, 20, seed=1)
    paired = estimate(own) - estimate(rival)
    assert paired.interval == pytest.approx(estimate(own - rival).interval)
    assert (estimate(own[:1]) - estimate(rival)).interval == pytest.approx(estimate(own[:1] - rival).interval)
    assert minus(estimate(own), estimate(own)) == {"difference": 0.0, "interval": (0.0, 0.0), "p": 1.0}
    seeds = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[1.0], [5.0]])
    apart = estimate(seeds[0].expand(3, 6)) - estimate(seeds[1].expand(2, 6))  # both sides' seeds are chance
    errors = [stats.t.isf(0.025, len(s) - 1) * s.std().item() / len(s) ** 0.5 for s in seeds]
    assert apart.value == pytest.approx(7 / 3 - 3) and half_width(apart) == pytest.approx(np.hypot(*errors))


def test_holm_holds_the_least_p_against_all():
    assert holm([0.01, 0.04, 0.03, 0.005]) == [True, False, False, True]  # 0.03 > 0.05 / 2
    assert holm([0.04]) == [True] and holm([0.04, 0.9]) == [False, False] and holm([]) == []
    assert holm([0.0, 0.0, 0.02, 0.04]) == [True] * 4


def test_the_interval_of_a_share_stays_in_its_range_and_that_of_a_loss_does_not():
    few = torch.tensor([[0.8, 1.0], [1.0, 0.9]])  # two seeds on two windows: the t quantiles are 12.7
    assert named("loss", estimate(few))["loss_interval"][1] > 1
    low, high = named("share", estimate(few), as_share)["share_interval"]
    assert (low, high) == (max(0, estimate(few).interval[0]), 1)
    assert named("share", estimate(1 - few), as_share)["share_interval"][0] == 0


def test_a_ladder_of_prices_spans_the_range_evenly():
    prices = ladder((0.02, 0.5), 5)
    assert prices[0] == 0.02 and prices[-1] == pytest.approx(0.5)
    ratios = [after / before for before, after in pairwise(prices)]
    assert ratios == pytest.approx([ratios[0]] * 4)
    for low in range(1, 400):  # a router refuses a price outside of its range
        assert all(low / 1000 <= price <= 1.07 for price in ladder((low / 1000, 1.07), 7))
