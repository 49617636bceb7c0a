"""Intervals, tests and frontiers against closed forms and naive enumeration."""

from itertools import pairwise, product

import pytest
import torch

from duorl.evaluation.budgets import Ladder, budget_rows, difference, summaries
from duorl.evaluation.statistics import bootstrap_interval, hypervolume, interpolate, reaches, sign_flip_test
from duorl.prices import ladder


def test_the_bootstrap_covers_seeds_as_well_as_windows():
    """Windows alike and seeds apart: only the seeds' spread is left, and the other way round."""
    seeds = torch.tensor([0.0, 1.0, 2.0, 3.0])[:, None].expand(4, 50)
    low, high = bootstrap_interval(seeds, resamples=4000)
    exact = torch.tensor([sum(drawn) / 4 for drawn in product([0.0, 1.0, 2.0, 3.0], repeat=4)])
    assert low == pytest.approx(exact.quantile(0.025).item(), abs=0.25)
    assert high == pytest.approx(exact.quantile(0.975).item(), abs=0.25)
    windows = torch.randn(1, 400, generator=torch.Generator().manual_seed(0))
    low, high = bootstrap_interval(windows.expand(3, 400))
    assert (high - low) / 2 == pytest.approx(1.96 * windows.std().item() / 20, rel=0.1)
    assert bootstrap_interval(windows) == bootstrap_interval(windows[0])


def test_the_sign_flip_test_is_the_enumeration_of_all_signs():
    values = torch.tensor([0.5, 1.0, -0.2, 0.8, 0.3, 0.9])
    signs = torch.tensor(list(product([-1.0, 1.0], repeat=6)))
    exact = ((signs @ values).abs() >= values.sum() - 1e-6).float().mean().item()
    assert sign_flip_test(values, flips=40_000) == pytest.approx(exact, abs=0.01)
    assert sign_flip_test(torch.stack([values, values])) == sign_flip_test(values)
    assert sign_flip_test(torch.ones(20)) < 0.001 and sign_flip_test(torch.zeros(5)) == 1.0


def test_hypervolume_is_the_area_under_the_steps():
    compute, loss = torch.tensor([0.5, 0.2, 0.9, 1.5]), torch.tensor([2.0, 3.0, 2.5, 0.0])
    naive = 0.0
    for x in torch.arange(0.0005, 1, 0.001):
        reached = [lost for spent, lost in zip(compute, loss, strict=True) if spent <= x]
        naive += 0.001 * max(0.0, 4.0 - min([4.0, *(float(lost) for lost in reached)]))
    assert hypervolume(compute, loss, worst_loss=4.0) == pytest.approx(naive, abs=2e-3)
    assert hypervolume(compute, loss, worst_loss=0.0) == 0.0


def test_interpolation_is_linear_and_refuses_to_extrapolate():
    compute, values = torch.tensor([0.8, 0.2]), torch.tensor([[1.0, 5.0], [3.0, 9.0]])
    assert interpolate(compute, values, 0.35).tolist() == pytest.approx([2.5, 8.0])
    assert interpolate(compute, values, 0.2).tolist() == [3.0, 9.0]
    assert interpolate(compute, values, 0.8).tolist() == pytest.approx([1.0, 5.0])
    assert interpolate(compute, values, 0.19) is None and interpolate(compute, values, 0.81) is None
    assert reaches(compute, values[:, 0], 2.5) == pytest.approx(0.35)
    assert reaches(compute, values[:, 0], 4.0) == pytest.approx(0.2) and reaches(compute, values[:, 0], 0.5) is None


def made_up(shift: float, seeds: int) -> list[Ladder]:
    compute = torch.tensor([0.1, 0.5, 0.9])
    generator = torch.Generator().manual_seed(seeds)
    base = torch.randn(60, generator=torch.Generator().manual_seed(9)) + torch.tensor([3.0, 2.0, 1.5])[:, None]
    return [Ladder(compute, base + shift + 0.01 * torch.randn(3, 60, generator=generator)) for _ in range(seeds)]


def test_routers_are_compared_window_by_window_at_equal_compute(tmp_path):
    ladders = {"best fixed": made_up(0.0, 1), "good": made_up(-0.05, 3), "narrow": made_up(0.0, 1)}
    ladders["narrow"] = [Ladder(torch.tensor([0.4, 0.5, 0.6]), ladders["narrow"][0].losses)]
    rows = {(row["router"], row["target"]): row for row in budget_rows(ladders, [0.3, 0.5], resamples=200)}
    good = rows["good", 0.3]
    against = good["minus"]["best fixed"]
    assert good["seeds"] == 3 and against["difference"] == pytest.approx(-0.05, abs=0.005)
    assert against["interval"][1] < 0 and against["p"] < 0.01  # though windows spread by 1
    assert good["loss_interval"][1] - good["loss_interval"][0] > 0.2
    assert rows["narrow", 0.3]["loss"] is None and rows["narrow", 0.3]["spends"] == pytest.approx([0.4, 0.6])
    assert "narrow" not in good["minus"] and "narrow" in rows["good", 0.5]["minus"]
    found = {row["router"]: row for row in summaries(ladders, level=1.8, worst_loss=3.5, resamples=200)}
    assert found["good"]["hypervolume"] > found["best fixed"]["hypervolume"]
    assert found["good"]["level_at"] < found["best fixed"]["level_at"] < 0.9
    ladders["good"][0].save(tmp_path / "ladder.safetensors")
    again = Ladder.load(tmp_path / "ladder.safetensors")
    assert torch.equal(again.losses, ladders["good"][0].losses)


def test_seeds_are_paired_or_broadcast():
    own, rival = torch.zeros(3, 4), torch.tensor([[1.0] * 4, [3.0] * 4])
    assert difference(own, rival, resamples=10)["difference"] == -2.0
    assert difference(own[:1], rival, resamples=10)["difference"] == -2.0
    assert difference(own, own, resamples=10) == {"difference": 0.0, "interval": (0.0, 0.0), "p": 1.0}


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
    assert torch.equal(ladder.losses[1], measured.loss.mean(1)) and ladder.compute[1] == measured.compute.mean()
