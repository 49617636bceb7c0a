"""What mixing can reach: hulls against naive mixtures, their intervals against leaving out by hand, kept ladders."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from test_statistics import noise

from duorl.evaluation import Frontier, Ladder, measure
from duorl.evaluation.budgets import MeasuredText, budget_rows, load_texts, save_texts, summaries
from duorl.evaluation.frontier import best_at, hypervolume, lower_hull, shares_at
from duorl.evaluation.statistics import as_share, estimate, named
from duorl.routers import PatternRouter

LADDERS = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 50)), min_size=1, max_size=8)


def steps(compute: list[float], losses: torch.Tensor, **more) -> Ladder:
    return Ladder(torch.tensor(compute, dtype=losses.dtype)[:, None].expand_as(losses).contiguous(), losses, **more)


def best_mixture(compute: np.ndarray, value: np.ndarray, target: float) -> float:
    """The lowest mean of any two steps that spend at most the target."""
    found = []
    for one, other in ((a, b) for a in range(len(compute)) for b in range(len(compute))):
        low, high = compute[one], compute[other]
        if low <= target + 1e-9 and high <= target + 1e-9:
            found.append(value[one])
        elif low <= target + 1e-9 < high:
            share = (target - low) / (high - low)
            found.append(value[one] + share * (value[other] - value[one]))
    return min(found)


@settings(max_examples=300, deadline=None)
@given(LADDERS, st.floats(0, 1))
def test_the_hull_is_the_best_of_all_mixtures_of_two(points, place):
    compute, value = (np.array(column, float) for column in zip(*points, strict=True))
    target = compute.min() + place * (compute.max() - compute.min())
    assert best_at(compute, value, target) == pytest.approx(best_mixture(compute, value, target), abs=1e-6)
    shares = shares_at(compute, value, target)
    assert shares.sum() == pytest.approx(1) and (shares >= 0).all() and (shares > 0).sum() <= 2
    assert shares @ compute <= target + 1e-6
    assert shares @ value == pytest.approx(best_at(compute, value, target))


@settings(max_examples=50, deadline=None)
@given(LADDERS, st.integers(0, 60))
def test_the_hypervolume_is_the_area_above_the_hull(points, worst):
    compute, value = (np.array(column, float) for column in zip(*points, strict=True))
    compute = compute / 20
    width = (1 - compute.min()) / 4000
    naive = sum(
        width * max(0.0, worst - best_at(compute, value, compute.min() + width * (n + 0.5))) for n in range(4000)
    )
    assert hypervolume(compute, value, worst) == pytest.approx(naive, abs=1e-3 + 0.003 * naive)


def test_more_steps_on_a_line_change_nothing():
    def area(count):
        compute = np.linspace(0.1, 1, count)
        return hypervolume(compute, 5 - 4 * (compute - 0.1) / 0.9, 5.0)

    assert area(2) == pytest.approx(0.9 * 4 / 2) and area(33) == pytest.approx(area(2))


def test_a_frontier_does_not_leave_the_range_that_all_seeds_can_spend():
    falling = steps([0.8, 0.2], torch.tensor([[1.0, 5.0], [3.0, 9.0]]))
    frontier = Frontier([falling])
    assert [frontier.at(target).value for target in (0.35, 0.2, 0.8)] == pytest.approx([5.25, 6.0, 3.0])
    assert frontier.at(0.19) is None and frontier.at(0.81) is None
    narrow = steps([0.2, 0.4], torch.tensor([[3.0, 9.0], [3.0, 3.0]]))
    both = Frontier([falling, narrow])
    assert both.range == pytest.approx((0.2, 0.4)) and both.at(0.3).value == pytest.approx((5.5 + 4.5) / 2)
    assert np.array(both.line()) == pytest.approx(np.array([(t, both.at(t).value) for t in (0.2, 0.4)]))
    finer = steps([0.8, 0.5, 0.2], torch.tensor([[1.0, 5.0], [2.0, 7.0], [3.0, 9.0]]))  # another step, the same line
    assert Frontier([finer, falling]).at(0.35).interval == pytest.approx(Frontier([falling] * 2).at(0.35).interval)


def test_beyond_the_best_step_nobody_spends_more():
    rising = steps([0.2, 0.6, 0.9], torch.tensor([[3.0], [2.0], [2.5]]).expand(3, 4))
    frontier = Frontier([rising])
    assert frontier.at(0.8).value == 2.0 and frontier.at(0.8, "spent").value == pytest.approx(0.6)


def test_router_text_decides_which_steps_are_mixed():
    """On router text the middle step is below the line between its neighbours, on the measured text it is above."""
    known = steps([0.0, 0.5, 1.0], torch.tensor([[3.0], [1.5], [1.0]]).expand(3, 4))
    losses = torch.tensor([[3.0], [2.5], [1.0]]).expand(3, 4)
    assert Frontier([steps([0.0, 0.5, 1.0], losses)]).at(0.25).value == pytest.approx(2.5)  # the line
    assert Frontier([steps([0.0, 0.5, 1.0], losses, chosen=known)]).at(0.25).value == pytest.approx(2.75)


def test_what_windows_spend_and_what_is_chosen_is_chance_too():
    """A loss at a compute, left out file by file on both texts, each time with its own choice and its own shares."""
    spent = torch.cat([noise(2, 6) / 50 + torch.tensor([[0.3], [0.7]]), torch.full((1, 6), 0.5)])
    losses = noise(3, 6, seed=1) / 10 + torch.tensor([[3.0], [2.0], [2.5]])
    chosen = Ladder(spent, noise(3, 6, seed=2) / 10 + torch.tensor([[3.0], [2.0], [2.5]]))
    files, chosen_files = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 1, 1, 2, 2, 2])
    found = Frontier([Ladder(spent, losses, chosen=chosen)], files, chosen_files).at(0.6)

    def by_hand(measured, router_text):
        hull = lower_hull(chosen.spent[:, router_text].mean(1).numpy(), chosen.losses[:, router_text].mean(1).numpy())
        own, values = spent[:, measured].mean(1).numpy()[hull], losses[:, measured].mean(1).numpy()[hull]
        return np.interp(0.6, own, values)

    everything = torch.ones(6, dtype=torch.bool)
    assert found.texts[0].without == pytest.approx([by_hand(files != file, everything) for file in range(3)])
    assert found.texts[1].without == pytest.approx([by_hand(everything, chosen_files != file) for file in range(3)])
    assert len({len(lower_hull(np.r_[0.3, 0.7, 0.5], x)) for x in (np.r_[3, 2, 2.4], np.r_[3, 2, 2.6])}) == 2
    alone = Frontier([Ladder(spent, losses)], files).at(0.6)
    assert len(alone.texts) == 1 and len(found.errors) == 2  # the choice on the measured text is made anew there
    assert (found - alone).texts[1].without == pytest.approx(found.texts[1].without - alone.value)


def test_agreement_speed_and_own_flops_are_those_of_the_mixture():
    spent = torch.tensor([[0.2, 0.2], [0.8, 0.8]])
    found = {
        "top1_agreement": torch.tensor([[0.4, 0.6], [0.8, 1.0]]),
        "seconds": torch.tensor([[1.0, 3.0, 2.0], [4.0, 4.0, 4.0]]),  # batches, not windows
        "own_flops": torch.tensor([[10.0], [30.0]]),
    }
    losses = torch.tensor([[2.0, 2.0], [1.0, 1.0]])
    (row,) = budget_rows({"mine": [Ladder(spent, losses, **found)]}, [0.5])
    assert row["top1_agreement"] == pytest.approx((0.5 + 0.9) / 2)
    assert row["tokens_per_second"] == pytest.approx(1 / 3) and row["router_flops"] == pytest.approx(20)
    low, high = row["tokens_per_second_interval"]
    assert low < 1 / 3 < high
    (row,) = budget_rows({"mine": [Ladder(spent, losses, **found)]}, [0.9])
    assert row["top1_agreement"] is row["tokens_per_second"] is row["loss"] is row["router_flops"] is None


def test_agreement_can_be_the_goal():
    """The step in the middle has a low loss and a low agreement: each goal has its own mixture."""
    agreement = torch.tensor([[0.4], [0.45], [1.0]]).expand(3, 4)
    ladder = steps([0.0, 0.5, 1.0], torch.tensor([[3.0], [1.0], [1.0]]).expand(3, 4), top1_agreement=agreement)
    assert Frontier([ladder], goal="top1_agreement").at(0.5).value == pytest.approx(0.7)
    assert Frontier([ladder]).at(0.5, "top1_agreement").value == pytest.approx(0.45)
    area = Frontier([ladder], goal="top1_agreement").area(torch.full((4,), 0.4))
    assert area.value == pytest.approx(0.6 / 2)


def test_the_interval_of_a_share_at_a_compute_stays_in_its_range():
    few = torch.tensor([[0.8, 1.0], [1.0, 0.9]])
    expected = named("share", estimate(few), as_share)["share_interval"]
    ladders = [Ladder(torch.tensor([[0.5, 0.5]]), torch.ones(1, 2), top1_agreement=few[None, seed]) for seed in (0, 1)]
    (row,) = budget_rows({"mine": ladders}, [0.5])
    assert row["top1_agreement"] == pytest.approx(0.925) and row["top1_agreement_interval"] == expected


def test_a_level_is_reached_where_the_difference_to_it_may_be_zero():
    """The loss falls by 0.1 per 0.1 of compute, in every window; windows differ by up to 0.1 from the level."""
    level, off = torch.full((8,), 2.0), torch.tensor([-0.1, 0.1] * 4)
    line = steps([0.0, 1.0], torch.tensor([[2.7], [1.7]]) + off)
    reach = Frontier([line]).reaches(level)
    half = (estimate(off).interval[1] - estimate(off).interval[0]) / 2
    assert reach.compute == pytest.approx(0.7) and reach.interval == pytest.approx((0.7 - half, 0.7 + half), abs=1e-6)
    beyond = Frontier([line]).reaches(torch.full((8,), 1.72))
    assert beyond.compute == pytest.approx(0.98) and beyond.interval[1] is None  # not shown
    nowhere = Frontier([line]).reaches(torch.full((8,), 1.0))
    assert nowhere == (None, (None, None))
    assert Frontier([steps([0.3], torch.ones(1, 1))]).reaches(torch.ones(1)) == (pytest.approx(0.3), None)
    same = Frontier([steps([0.0, 1.0], torch.stack([level + 1, level]) + off)]).reaches(level + off)
    assert same.compute == pytest.approx(1.0) and same.interval == pytest.approx((1.0, 1.0))  # all-big is all-big


def test_a_router_is_paired_with_the_mixture_that_spends_what_it_spends():
    """Fixed patterns lose 3 - 2 c in every window; seeds of the router spend and lose something else in each."""
    noisy = noise(1, 10)
    fixed = Frontier([steps([0.0, 1.0], torch.tensor([[3.0], [1.0]]) + noisy)])
    spent = 0.5 + noise(2, 10, seed=1) / 20
    losses = 3 - 2 * spent + noisy - 0.1 + torch.tensor([[0.01], [-0.01]])
    found = fixed.excess(losses, spent)
    assert found.value == pytest.approx(-0.1) and found.seeds[0] == pytest.approx([-0.09, -0.11])
    assert found.texts[0].without == pytest.approx([-0.1] * 10)  # windows differ, their differences do not
    assert fixed.excess(losses, spent + 1) is None


def test_the_hypervolumes_interval_is_that_of_the_seeds_mean():
    """Seeds far apart: an interval of one drawn seed would span them all."""
    seeds = [steps([0.2, 0.5], torch.tensor([[3.0], [2.0]]).expand(2, 9) + shift) for shift in (0.0, 0.1, 0.2, 0.3)]
    (row,) = summaries({"mine": seeds}, level=2.0, worst=torch.full((9,), 4.0))
    areas = [hypervolume(one.compute.numpy(), one.loss.numpy(), 4.0) for one in seeds]
    closed = stats.ttest_1samp(areas, 0).confidence_interval(0.95)
    assert row["hypervolume"] == pytest.approx(np.mean(areas))
    assert row["hypervolume_interval"] == pytest.approx(tuple(closed), rel=1e-4)
    assert row["hypervolume_interval"][1] - row["hypervolume_interval"][0] < max(areas) - min(areas) + 0.1


def made_up(shift: float, seeds: int) -> list[Ladder]:
    generator = torch.Generator().manual_seed(seeds)
    base = torch.randn(60, generator=torch.Generator().manual_seed(9)) + torch.tensor([3.0, 2.0, 1.5])[:, None]
    noisy = (base + shift + 0.01 * torch.randn(3, 60, generator=generator) for _ in range(seeds))
    return [steps([0.1, 0.5, 0.9], losses) for losses in noisy]


def test_routers_are_compared_window_by_window_at_equal_compute():
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
    falling = torch.tensor([[0.1], [0.0]])
    level = lambda losses: [steps([0.1, 0.9], losses + falling)]  # noqa: E731
    others = {str(n): level(base + 0.1 * noise(30, seed=9 + n)) for n in range(20)}
    for more, holds in (({}, True), (others, False)):
        rows = budget_rows({"fixed": level(base), "one": level(base + apart), **more}, [0.5])
        (against,) = (row["minus"]["fixed"] for row in rows if row["router"] == "one")
        assert 0.05 / 21 < against["p"] < 0.05 and against["holds"] == holds


def test_all_tables_of_a_text_follow_from_its_kept_ladders(tmp_path):
    chosen = [made_up(0.0, 1)[0], *made_up(-0.05, 2)]
    whole = [
        Ladder(one.spent, one.losses, one.losses / 9, noise(3, 5).abs() + 1, torch.ones(3, 1), by)
        for one, by in zip([made_up(0.0, 1)[0], *made_up(-0.05, 2)], chosen, strict=True)
    ]
    files, flops = torch.arange(60) // 3, torch.tensor([1e6, 3e6])
    small, big = torch.full((60,), 3.5), whole[0].losses[2]
    text = MeasuredText({"best fixed": whole[:1], "a/b": whole[1:]}, files, files, small, big, flops, 128)
    save_texts({"code": text, "my/text.txt": text}, tmp_path / "ladders.gz")
    again = load_texts(tmp_path / "ladders.gz")
    assert list(again) == ["code", "my/text.txt"] and list(again["code"].ladders) == ["best fixed", "a/b"]
    numbers = text.numbers([0.3, 0.9])
    assert again["my/text.txt"].numbers([0.3, 0.9]) == numbers and numbers["tokens"] == 60 * 128
    row = numbers["rows"][0]
    assert row["flops_per_token"] == pytest.approx(1e6 + 0.3 * 3e6 + 1)
    assert row["flops_share"] == pytest.approx(row["flops_per_token"] / 4e6)


def test_a_ladder_of_patterns_is_their_measurement(duo, tokens, tmp_path):
    routers = [PatternRouter([1, 1, 1]), PatternRouter([2, 1, 2])]
    ladder = Ladder.climb(duo, routers, tokens, tokens[:2])
    measured = measure(duo, routers[1], tokens)
    assert torch.equal(ladder.losses[1], measured.loss.mean(1)) and ladder.spent.shape == (2, len(tokens))
    assert ladder.compute[1] == pytest.approx(measured.compute.mean().item())
    assert torch.equal(ladder.chosen.losses, ladder.losses[:, :2])
    ladder.save(tmp_path / "ladder.safetensors")
    again = Ladder.load(tmp_path / "ladder.safetensors").tensors()
    assert again.keys() == ladder.tensors().keys() and all(
        torch.equal(again[k], v) for k, v in ladder.tensors().items()
    )
