"""Intervals, tests and frontiers against closed forms and naive computation."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy import stats

from benchmarks.coverage import Spread, draw
from duorl.evaluation.budgets import Ladder, budget_rows, loss_at, minus, summaries
from duorl.evaluation.statistics import as_share, estimate, holm, hypervolume, named, reaches
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
    assert found.value == pytest.approx(np.mean(whole)) and found.without == pytest.approx(left)
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


def test_hypervolume_is_the_area_under_the_steps():
    compute, loss = torch.tensor([0.5, 0.2, 0.9, 1.5]), torch.tensor([2.0, 3.0, 2.5, 0.0])
    naive = 0.0
    for x in torch.arange(0.0005, 1, 0.001):
        reached = [lost for spent, lost in zip(compute, loss, strict=True) if spent <= x]
        naive += 0.001 * max(0.0, 4.0 - min([4.0, *(float(lost) for lost in reached)]))
    assert hypervolume(compute, loss, worst_loss=4.0) == pytest.approx(naive, abs=2e-3)
    assert hypervolume(compute, loss, worst_loss=0.0) == 0.0


def steps(compute: list[float], losses: torch.Tensor) -> Ladder:
    return Ladder(torch.tensor(compute)[:, None].expand_as(losses).contiguous(), losses)


def test_interpolation_is_linear_and_refuses_to_extrapolate():
    falling = steps([0.8, 0.2], torch.tensor([[1.0, 5.0], [3.0, 9.0]]))
    assert [loss_at([falling], target).value for target in (0.35, 0.2, 0.8)] == pytest.approx([5.25, 6.0, 3.0])
    assert loss_at([falling], 0.19) is None and loss_at([falling], 0.81) is None
    both = loss_at([falling, steps([0.2, 0.4], torch.tensor([[3.0, 9.0], [3.0, 3.0]]))], 0.3)
    assert both.value == pytest.approx((5.5 + 4.5) / 2)
    finer = steps([0.8, 0.5, 0.2], torch.tensor([[1.0, 5.0], [2.0, 7.0], [3.0, 9.0]]))  # another step, the same line
    assert loss_at([falling, finer], 0.35).value == pytest.approx(5.25)
    assert loss_at([finer, falling], 0.35).interval == pytest.approx(loss_at([falling, falling], 0.35).interval)
    compute, losses = torch.tensor([0.8, 0.2]), torch.tensor([1.0, 3.0])
    assert reaches(compute, losses, 2.5) == pytest.approx(0.35)
    assert reaches(compute, losses, 4.0) == pytest.approx(0.2) and reaches(compute, losses, 0.5) is None


def test_agreement_and_speed_are_interpolated_like_losses():
    spent = torch.tensor([[0.2, 0.2], [0.8, 0.8]])
    found = {
        "top1_agreement": torch.tensor([[0.4, 0.6], [0.8, 1.0]]),
        "seconds": torch.tensor([[1.0, 3.0], [4.0, 4.0]]),
    }
    (row,) = budget_rows({"mine": [Ladder(spent, torch.ones(2, 2), **found)]}, [0.5])
    assert row["top1_agreement"] == pytest.approx((0.5 + 0.9) / 2)
    assert row["tokens_per_second"] == pytest.approx(1 / 3)
    low, high = row["tokens_per_second_interval"]
    assert low < 1 / 3 < high
    (row,) = budget_rows({"mine": [Ladder(spent, torch.ones(2, 2), **found)]}, [0.9])
    assert row["top1_agreement"] is row["tokens_per_second"] is row["loss"] is None


def test_the_interval_of_a_share_stays_in_its_range_and_that_of_a_loss_does_not():
    few = torch.tensor([[0.8, 1.0], [1.0, 0.9]])  # two seeds on two windows: the t quantiles are 12.7
    assert named("loss", estimate(few))["loss_interval"][1] > 1
    low, high = named("share", estimate(few), as_share)["share_interval"]
    assert (low, high) == (max(0, estimate(few).interval[0]), 1)
    assert named("share", estimate(1 - few), as_share)["share_interval"][0] == 0
    ladders = [Ladder(torch.tensor([[0.5, 0.5]]), torch.ones(1, 2), top1_agreement=few[None, seed]) for seed in (0, 1)]
    (row,) = budget_rows({"mine": ladders}, [0.5])
    assert row["top1_agreement"] == pytest.approx(0.925) and row["top1_agreement_interval"] == (low, high)


def test_what_windows_spend_is_chance_too():
    """A loss at a compute, left out file by file: the other files spend something else."""
    spent = noise(2, 6) / 50 + torch.tensor([[0.3], [0.7]])
    losses = noise(2, 6, seed=1) / 10 + torch.tensor([[3.0], [2.0]])
    found = loss_at([Ladder(spent, losses)], 0.5)
    for window in range(6):
        rest = [torch.cat([v[:, :window], v[:, window + 1 :]], 1).mean(1) for v in (spent, losses)]
        share = (0.5 - rest[0][0]) / (rest[0][1] - rest[0][0])
        assert found.without[window] == pytest.approx(rest[1][0].lerp(rest[1][1], share).item())


def test_the_hypervolumes_interval_is_that_of_the_seeds_mean():
    """Seeds far apart: an interval of one drawn seed would span them all."""
    seeds = [steps([0.2, 0.5], torch.tensor([[3.0], [2.0]]).expand(2, 9) + shift) for shift in (0.0, 0.1, 0.2, 0.3)]
    (row,) = summaries({"mine": seeds}, level=2.0, worst=torch.full((9,), 4.0))
    areas = [hypervolume(one.compute, one.loss, worst_loss=4.0) for one in seeds]
    closed = stats.ttest_1samp(areas, 0).confidence_interval(0.95)
    assert row["hypervolume"] == pytest.approx(np.mean(areas))
    assert row["hypervolume_interval"] == pytest.approx(tuple(closed), rel=1e-5)
    assert row["hypervolume_interval"][1] - row["hypervolume_interval"][0] < max(areas) - min(areas) + 0.1


def made_up(shift: float, seeds: int) -> list[Ladder]:
    generator = torch.Generator().manual_seed(seeds)
    base = torch.randn(60, generator=torch.Generator().manual_seed(9)) + torch.tensor([3.0, 2.0, 1.5])[:, None]
    noisy = (base + shift + 0.01 * torch.randn(3, 60, generator=generator) for _ in range(seeds))
    return [steps([0.1, 0.5, 0.9], losses) for losses in noisy]


def test_routers_are_compared_window_by_window_at_equal_compute(tmp_path):
    ladders = {"best fixed": made_up(0.0, 1), "good": made_up(-0.05, 3), "narrow": made_up(0.0, 1)}
    ladders["narrow"] = [steps([0.4, 0.5, 0.6], ladders["narrow"][0].losses)]
    rows = {(row["router"], row["target"]): row for row in budget_rows(ladders, [0.3, 0.5])}
    good = rows["good", 0.3]
    against = good["minus"]["best fixed"]
    assert good["seeds"] == 3 and against["difference"] == pytest.approx(-0.05, abs=0.005)
    assert against["interval"][1] < 0 and against["p"] < 0.01 and against["holds"]  # though windows spread by 1
    assert good["loss_interval"][1] - good["loss_interval"][0] > 0.2
    assert rows["narrow", 0.3]["loss"] is None and rows["narrow", 0.3]["spends"] == pytest.approx([0.4, 0.6])
    assert "narrow" not in good["minus"] and "narrow" in rows["good", 0.5]["minus"]
    found = {row["router"]: row for row in summaries(ladders, level=1.8, worst=torch.full((60,), 3.5))}
    assert found["good"]["hypervolume"] > found["best fixed"]["hypervolume"]
    assert found["good"]["level_at"] < found["best fixed"]["level_at"] < 0.9


def test_what_holds_depends_on_how_many_are_compared():
    """One router a little better than the fixed pattern, alone and among twenty that are like it."""
    base, apart = noise(30), noise(30, seed=2)
    apart = 0.1 * (apart - apart.mean()) / apart.std() - 0.045
    level = lambda losses: [steps([0.1, 0.9], losses.expand(2, 30).clone())]  # noqa: E731
    others = {str(n): level(base + 0.1 * noise(30, seed=9 + n)) for n in range(20)}
    for more, holds in (({}, True), (others, False)):
        rows = budget_rows({"fixed": level(base), "one": level(base + apart), **more}, [0.5])
        (against,) = (row["minus"]["fixed"] for row in rows if row["router"] == "one")
        assert 0.05 / 21 < against["p"] < 0.05 and against["holds"] == holds


def test_ladders_are_kept_and_older_files_read(tmp_path):
    kept = Ladder(noise(3, 4), noise(3, 4, seed=1), noise(3, 4, seed=2), noise(3, 1))
    kept.save(tmp_path / "ladder.safetensors")
    again = Ladder.load(tmp_path / "ladder.safetensors")
    assert torch.equal(again.losses, kept.losses) and torch.equal(again.spent, kept.spent)
    assert torch.equal(again.top1_agreement, kept.top1_agreement) and torch.equal(again.seconds, kept.seconds)
    save_file({"compute": torch.tensor([0.2, 0.5]), "losses": torch.ones(2, 4)}, tmp_path / "older.safetensors")
    assert Ladder.load(tmp_path / "older.safetensors").compute.tolist() == pytest.approx([0.2, 0.5])


def test_a_ladder_of_prices_spans_the_range_evenly():
    prices = ladder((0.02, 0.5), 5)
    assert prices[0] == 0.02 and prices[-1] == pytest.approx(0.5)
    ratios = [after / before for before, after in pairwise(prices)]
    assert ratios == pytest.approx([ratios[0]] * 4)
    for low in range(1, 400):  # a router refuses a price outside of its range
        assert all(low / 1000 <= price <= 1.07 for price in ladder((low / 1000, 1.07), 7))


def test_a_ladder_of_patterns_is_their_measurement(duo, tokens):
    from duorl.evaluation import measure
    from duorl.routers import PatternRouter

    ladder = Ladder.climb(duo, [PatternRouter([1, 1, 1]), PatternRouter([2, 1, 2])], tokens)
    measured = measure(duo, PatternRouter([2, 1, 2]), tokens)
    assert torch.equal(ladder.losses[1], measured.loss.mean(1)) and ladder.spent.shape == (2, len(tokens))
    assert ladder.compute[1] == pytest.approx(measured.compute.mean().item())
