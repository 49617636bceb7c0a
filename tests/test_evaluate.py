"""Measurements, intervals and the comparison."""

import csv
import json

import pytest
import torch
from test_routed_pass import routed_losses

from duorl.evaluation import Comparer, EvaluationOptions, evaluate, flatten, measure
from duorl.evaluation.statistics import estimate, holm
from duorl.oracle import exhaustive
from duorl.reports.figures import budget_table, frontier, heat_map, table
from duorl.routers import ConstantRouter, HeadRouter, RandomRouter


@pytest.fixture(scope="module")
def windows():
    return torch.randint(61, (24, 8), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def comparison(duo, windows):
    options = EvaluationOptions(windows=12, reference_windows=4, fixed_windows=8, batch=5)
    comparer = Comparer(
        duo, windows[:12], windows[12:], price=0.1, actions=("small", "big"), reference="small", options=options
    )
    comparer.knowable = ConstantRouter("big")  # whatever; here it is all-big that could have been known
    routers = {
        "random": [RandomRouter()],
        "all-small": [ConstantRouter("small")],
        "all-big": [ConstantRouter("big")],
        "best fixed": [comparer.fixed],
        "heads": [HeadRouter(3, 32, seed=seed) for seed in (0, 1)],
        **comparer.bounds,
    }
    return comparer.compare(routers, {"price": 0.1})


def rows(comparison):
    return {row["router"]: row for row in comparison.rows}


def test_measured_losses_are_the_models(duo, windows):
    router = HeadRouter(3, 32, seed=1)
    measured = measure(duo, router, windows, batch=7)
    assert torch.allclose(measured.loss, routed_losses(duo, windows, measured.routes), atol=1e-5)
    assert (measured.seconds > 0).all()


def test_the_most_likely_tokens_are_the_models(duo, windows):
    router = HeadRouter(3, 32, seed=1)
    measured = measure(duo, router, windows, batch=7)
    logits = duo(windows[:, :-1], routes=measured.routes).logits
    assert torch.equal(measured.predicted, logits.argmax(-1))


def test_top1_agreement_is_the_share_of_all_bigs_tokens(duo, windows, comparison):
    found, held_out = rows(comparison), windows[12:]
    big = duo.stack.all_big(held_out[:, :-1])
    top = duo.stack.logits(big).argmax(-1)
    small = measure(duo, ConstantRouter("small"), held_out).predicted
    assert found["all-small"]["top1_agreement"] == pytest.approx((small == top).float().mean().item())
    assert found["all-big"]["top1_agreement"] == 1 > found["all-small"]["top1_agreement"] > 0


def test_known_rows(comparison):
    found = rows(comparison)
    assert found["all-small"]["return"] == pytest.approx(-0.1 * 0.25)
    assert found["all-big"]["compute"] == pytest.approx(1.0)
    assert found["all-big"]["actions"] == {"skip": 0, "small": 0, "big": 1}
    assert found["best fixed"]["return_minus_fixed_interval"] == (0, 0)
    assert found["oracle"]["regret"] == pytest.approx(0, abs=1e-5) and found["oracle"]["agreement"] == 1
    for row in comparison.rows:
        assert row["regret"] >= -1e-5
        for name in (
            "loss",
            "perplexity",
            "compute",
            "return",
            "regret",
            "agreement",
            "top1_agreement",
            "tokens_per_second",
        ):
            if (name, row["router"]) == ("tokens_per_second", "oracle"):
                assert row["tokens_per_second_interval"] is None  # one batch
                continue
            low, high = row[f"{name}_interval"]
            assert low - 1e-6 <= row[name] <= high + 1e-6
        for name in ("compute", "agreement", "top1_agreement"):
            assert row[f"{name}_interval"][0] >= 0 and row[f"{name}_interval"][1] <= 1
        assert all(low >= 0 and high <= 1 for low, high in row["actions_interval"].values())
    assert found["heads"]["tokens"] == 84 and found["heads"]["reference"]["tokens"] == 28


def test_a_row_of_several_seeds_is_their_mean(duo, windows, comparison):
    row = rows(comparison)["heads"]
    alone = [measure(duo, HeadRouter(3, 32, seed=seed), windows[12:]) for seed in (0, 1)]
    assert row["seeds"] == 2 and row["loss"] == pytest.approx(sum(m.loss.mean().item() for m in alone) / 2)
    assert row["compute"] == pytest.approx(sum(m.compute.mean().item() for m in alone) / 2)
    assert 0 < row["return_minus_fixed_p"] <= 1


def test_intervals_are_over_files_and_what_holds_is_said(duo, windows):
    options = EvaluationOptions(windows=12, reference_windows=4, fixed_windows=4, bound="none")
    settings = {"price": 0.1, "actions": ("small", "big"), "reference": "small", "options": options}
    files = torch.arange(12) // 3
    comparer = Comparer(duo, windows[:12], windows[12:], files=files, **settings)
    routers = {"best fixed": [comparer.fixed], "all-skip": [ConstantRouter("skip")], "random": [RandomRouter()]}
    found = rows(comparer.compare(routers, {"price": 0.1}))
    losses = measure(duo, ConstantRouter("skip"), windows[12:]).loss.mean(1)
    assert found["all-skip"]["loss_interval"] == estimate(losses, files).interval != estimate(losses).interval
    p = [found[name]["loss_minus_fixed_p"] for name in ("all-skip", "random")]
    assert [found[name]["loss_minus_fixed_holds"] for name in ("all-skip", "random")] == holm(p)
    assert found["best fixed"]["loss_minus_fixed_holds"] is False


def test_the_regret_is_split_by_what_could_have_been_known(comparison):
    found = rows(comparison)
    assert found["all-big"]["regret_avoidable"] == pytest.approx(0, abs=1e-6)
    label_alone = found["all-big"]["regret"]
    for row in comparison.rows:
        assert row["regret"] == pytest.approx(label_alone + row["regret_avoidable"], abs=1e-5)


def test_best_fixed_wins_the_final(duo, windows):
    options = EvaluationOptions(windows=4, reference_windows=1, fixed_windows=1, finalists=8, final_windows=12)
    settings = {"price": 0.1, "actions": ("small", "big"), "reference": "small", "options": options}
    comparer = Comparer(duo, windows[:12], windows[12:], **settings)
    table = exhaustive(duo, windows[:12], context="uniform")
    assert comparer.fixed.config["route"] == table.routes[table.best_fixed(0.1)].tolist()


def test_the_best_pattern_of_every_budget_wins_its_final(duo, windows):
    options = EvaluationOptions(windows=4, reference_windows=1, fixed_windows=1, finalists=8, final_windows=12)
    settings = {"price": 0.1, "actions": ("small", "big"), "reference": "small", "options": options}
    comparer = Comparer(duo, windows[:12], windows[12:], **settings)
    table = exhaustive(duo, windows[:12], context="uniform")
    expected = [table.routes[table.best_fixed(allowed=table.with_big(count))].tolist() for count in range(4)]
    assert list(comparer.baseline.per_big().values()) == expected


def test_regret_is_the_oracles_return_minus_the_routers(duo, windows, comparison):
    held_out = windows[12:16]
    searched = exhaustive(duo, held_out, context="reference")
    best = searched.best(0.1)
    ideal = (searched.loss(best) + 0.1 * searched.compute[best]).mean()
    big = measure(duo, ConstantRouter("big"), held_out, context="reference")
    assert rows(comparison)["all-big"]["regret"] == pytest.approx((big.loss.mean() + 0.1 - ideal).item(), abs=1e-5)


def test_files_hold_the_same_numbers(comparison, tmp_path):
    comparison.save(tmp_path)
    saved = json.loads((tmp_path / "comparison.json").read_text())
    lines = list(csv.DictReader((tmp_path / "comparison.csv").read_text().splitlines()))
    assert [row["router"] for row in saved["rows"]] == [line["router"] for line in lines]
    for row, line in zip(saved["rows"], lines, strict=True):
        assert float(line["loss"]) == row["loss"]
        assert float(line["actions.big"]) == row["actions"]["big"]
        assert float(line["return_interval.low"]) == row["return_interval"][0]
    assert {
        "router",
        "context",
        "loss",
        "perplexity",
        "compute",
        "return",
        "regret",
        "actions",
        "tokens_per_second",
    } <= set(saved["rows"][0])


def test_only_pairs_are_flattened_as_intervals():
    row = {"loss_interval": (1.0, 2.0), "target_interval": 3, "big_interval": {"a": [4.0, 5.0]}}
    expected = {"loss_interval.low": 1.0, "loss_interval.high": 2.0, "target_interval": 3}
    assert dict(flatten(row)) == expected | {"big_interval.a.low": 4.0, "big_interval.a.high": 5.0}


def test_frontiers_reach_from_all_small_to_all_big(comparison):
    fixed, oracle = comparison.frontiers["fixed"], comparison.frontiers["oracle"]
    assert [point["big"] for point in fixed] == [point["big"] for point in oracle] == [0, 1, 2, 3]
    assert fixed[0]["loss"] == pytest.approx(rows(comparison)["all-small"]["loss"])
    assert fixed[3]["loss"] == pytest.approx(rows(comparison)["all-big"]["loss"])


def test_pictures_and_tables_show_every_router(comparison, duo, windows):
    labels = frontier(comparison).axes[0].get_legend_handles_labels()[1]
    assert {"random", "heads", "best fixed"} <= set(labels) and "oracle" not in labels
    assert table(comparison).row_count == 6
    routes = measure(duo, ConstantRouter("big"), windows).routes
    assert heat_map(routes, "title").axes[0].images[0].get_array().shape == (3, 7)
    assert budget_table(exhaustive(duo, windows[:1]).by_budget(), "title").row_count == 4


def test_evaluate_is_zero_for_the_reference_itself(duo, windows):
    found = evaluate(duo, ConstantRouter("small"), windows, price=0.4)
    assert found["gain"] == 0 and found["return"] == pytest.approx(-0.1)


def test_the_row_of_the_bound_is_in_the_context_of_its_search(duo, windows, comparison):
    """Its loss is the oracle's own, and not what its routes lose after others; the fixed pattern beside it likewise."""
    held_out = windows[12:16]
    searched = exhaustive(duo, held_out, context="reference")
    best = searched.best(0.1)
    row = rows(comparison)["oracle"]
    assert row["context"] == "reference" and row["loss"] == pytest.approx(searched.loss(best).mean().item(), abs=1e-5)
    assert row["compute"] == pytest.approx(searched.compute[best].mean().item(), abs=1e-6)
    fixed = rows(comparison)["best fixed"]["reference"]["loss"]
    assert row["loss_minus_fixed"] == pytest.approx(row["loss"] - fixed, abs=1e-5) and row["loss_minus_mix"] is None


def test_a_router_is_compared_with_the_best_mixture_at_its_compute(comparison):
    found = rows(comparison)
    assert found["all-small"]["loss_minus_mix"] == pytest.approx(0, abs=1e-6)  # the cheapest pattern, so it is mixed
    low, high = found["heads"]["loss_minus_mix_interval"]
    assert low < found["heads"]["loss_minus_mix"] < high
    assert found["oracle"]["loss_minus_mix"] is None  # another context
