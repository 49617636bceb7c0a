"""The study of the paper: its numbers against what they mean, its claims' verdicts, its pictures."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import make_duo
from test_routed_pass import reference_losses, routed_losses

import duorl
from duorl.corpus import Windows
from duorl.envs import Lockstep
from duorl.evaluation.compare import measure
from duorl.evaluation.statistics import estimate
from duorl.experiments import dense as cli_dense
from duorl.learners import Soft
from duorl.models.pretrain import Pretraining, PretrainOptions
from duorl.oracle import exhaustive
from duorl.paper import Study, StudySize, claims_page, dense, draw, scaling
from duorl.paper.claims import _verdict, claims
from duorl.paper.measures import early_exits
from duorl.paper.searches import Exhaustive, Searched
from duorl.routers import ConstantRouter, HeadRouter

FIGURES = [f"{number}{letter}" for number in "23" for letter in "abcd"] + ["4a", "4b", "4c", "5", "6", "7"]


class Names:
    """Stands for a tokenizer of the 61 tokens."""

    def decode(self, tokens):
        return f"<{tokens[0]}>\n" if tokens[0] % 7 == 0 else f"t{tokens[0]} $"


def some_windows():
    return torch.randint(61, (10, 14), generator=torch.Generator().manual_seed(3))


def small_study(exact=True):
    windows, model = some_windows(), make_duo("llama")

    def router(wanted):
        if wanted.learner == "ours":
            return HeadRouter(3, 32, seed=round(10 * wanted.at))
        env = Lockstep(model, windows[:4], actions=wanted.actions, windows_per_batch=2)
        return Soft(env, budget=wanted.at, updates=2).learn(1)

    return Study(
        model,
        Names(),
        windows[:4],
        {"prose": Windows(windows[4:8], torch.arange(4) // 2), "code": Windows(windows[7:], torch.arange(3))},
        learners=["ours"],
        router=router,
        size=StudySize(windows=4, pattern_windows=4, random_patterns=5, prices=(0.1, 0.3)),
        seed=0,
        exact=exact,
    )


@pytest.fixture(scope="module")
def windows():
    return some_windows()


@pytest.fixture(scope="module")
def study():
    return small_study()


@pytest.fixture(scope="module")
def figures(study):
    return study.run()


def test_a_study_says_before_which_routers_it_needs(study, figures):
    wanted = study.wanted()
    assert set(study._routers) == set(wanted) and len(set(wanted)) == len(wanted)


def test_the_list_of_figures_is_the_papers(figures):
    assert sorted(figures) == sorted(FIGURES)
    assert all(set(numbers["texts"]) == {"prose", "code"} for numbers in figures.values())


def test_heat_maps_are_the_oracles_choices_averaged_over_windows(figures, study, windows):
    table = exhaustive(study.model, windows[4:8])
    routes = table.routes[table.best(allowed=table.with_big(1))]
    found = figures["2a"]["texts"]["prose"]
    assert figures["2a"]["big"] == 1 and figures["2c"]["big"] == 2
    assert torch.allclose(torch.tensor(found["share_of_big"]), (routes == 2).float().mean(0).T)
    places = [layer - 1.0 for window in routes for token in window for layer in range(3) if token[layer] == 2]
    assert found["lateness"]["mean"] == pytest.approx(sum(places) / len(places), abs=1e-5)
    low, high = found["lateness"]["mean_interval"]
    assert low <= found["lateness"]["mean"] <= high


def test_curves_are_naive_losses(figures, study, windows):
    """Every point of the fixed and the routed curves, and the ends of the oracle's, by full forward passes."""
    curves = figures["4b"]["texts"]["prose"]
    text = windows[4:8]
    for context, naive in (("reference", reference_losses), ("routed", routed_losses)):
        for big, point in enumerate(curves[context]["fixed"]):
            routes = torch.tensor(study.patterns[big]).expand(4, 13, -1).contiguous()
            assert point["loss"] == pytest.approx(naive(study.model, text, routes).mean().item(), abs=1e-5)
        for price, point in zip((0.1, 0.3), curves[context]["ours"], strict=True):
            measured = measure(study.model, HeadRouter(3, 32, seed=round(10 * price)), text, context=context)
            assert point["loss"] == pytest.approx(measured.loss.mean().item(), abs=1e-5)
    all_big = measure(study.model, ConstantRouter("big"), text).loss.mean().item()
    assert curves["reference"]["oracle"][3]["loss"] == pytest.approx(all_big, abs=1e-5)
    assert curves["reference"]["oracle"][3]["minus_all_big"] == pytest.approx(0, abs=1e-6)
    for oracle, fixed in zip(curves["reference"]["oracle"], curves["reference"]["fixed"], strict=True):
        assert oracle["loss"] <= fixed["loss"] + 1e-6 and oracle["compute"] == pytest.approx(fixed["compute"])


def test_schedules_keep_the_mean_budget(figures):
    for found in figures["4c"]["texts"].values():
        falling, rising, constant = (found[kind]["big"] for kind in ("falling", "rising", "constant"))
        assert falling == rising[::-1] == sorted(falling, reverse=True) and falling[0] > falling[-1]
        assert sum(falling) == pytest.approx(sum(constant), abs=len(constant) / 8)
        assert found["constant"]["minus_constant"] == 0


def test_early_exits_are_routes_that_never_come_back():
    routes = torch.tensor(list(itertools.product((0, 2), repeat=4)))
    expected = [all(a != 0 or b == 0 for a, b in itertools.pairwise(route)) for route in routes.tolist()]
    assert early_exits(routes).tolist() == expected and sum(expected) == 5


@pytest.mark.parametrize(
    ("interval", "border", "expected"),
    [
        ((0.1, 0.2), {"above": 0}, "agrees"),
        ((-0.1, 0.2), {"above": 0}, "open"),
        ((-0.2, -0.1), {"above": 0}, "disagrees"),
        ((-0.2, -0.1), {"below": 0}, "agrees"),
        ((0.1, 0.2), {"below": 0}, "disagrees"),
        ((0.85, 0.95), {"above": 0.9}, "open"),
        ((0.1, 0.2), {"below": 0.5}, "agrees"),
        ((0.6, 0.7), {"below": 0.5}, "disagrees"),
    ],
)
def test_a_verdict_is_read_off_the_interval(interval, border, expected):
    assert _verdict(interval, **border).name == expected


def test_claims_follow_the_numbers(figures):
    """The same page with a number turned round says the opposite."""
    page = claims_page(figures, model="a model", command="the command")
    assert "the command" in page and page.count("\n| ") == len(claims(figures)) + 2  # head and rule
    turned = json.loads(json.dumps(figures))
    for found in turned["4c"]["texts"].values():
        found["falling"]["minus_constant_interval"] = [-0.2, -0.1]
        found["rising"]["minus_constant_interval"] = [0.1, 0.2]
    verdicts = {(c.figure, c.paper.split()[2]): c.verdict.name for c in claims(turned) if c.figure == "4c"}
    assert verdicts == {("4c", "falling"): "disagrees", ("4c", "rising"): "agrees"}


def verdict_of(figures, said):
    found = {claim.verdict.name for claim in claims(figures) if said in claim.paper and claim.text == "prose"}
    assert len(found) == 1
    return found.pop()


def test_a_u_must_bend_on_both_sides_and_in_the_middle(figures):
    turned = json.loads(json.dumps(figures))
    curve = turned["4b"]["texts"]["prose"]["reference"]["oracle"]
    for losses, expected in (
        ((3.0, 2.0, 1.0, 2.0), "agrees"),
        ((3.0, 1.0, 2.0, 2.5), "agrees"),
        ((1.0, 2.0, 3.0, 4.0), "disagrees"),
        ((4.0, 3.0, 2.0, 1.0), "disagrees"),
    ):
        for point, loss in zip(curve, losses, strict=True):
            point["loss"], point["windows"] = loss, [loss, loss + 0.5, loss - 0.5, loss]
        assert verdict_of(turned, "a U over the budget") == expected


def test_many_verdicts_are_many_chances(figures):
    """What is clear holds, what is only just outside of its border does not, beside so many others."""
    turned = json.loads(json.dumps(figures))
    for text, margin in (("prose", 1.01), ("code", 50.0)):
        for kind in ("falling", "rising"):
            schedule = turned["4c"]["texts"][text][kind]
            schedule["minus_constant"], schedule["minus_constant_interval"] = margin, [margin - 1, margin + 1]
    found = [claim for claim in claims(turned) if claim.figure == "4c"]
    assert all(claim.verdict.name == "agrees" for claim in found)
    assert {(claim.text, claim.holds) for claim in found} == {("prose", False), ("code", True)}
    assert "agrees^ |" in claims_page(turned, model="a model", command="duorl paper")


def test_the_best_of_many_is_chosen_anew_without_each_file(study, figures):
    """The interval of the best random pattern is that of the best, not of the one that happened to be it."""
    found, table = figures["4a"]["texts"]["prose"], study.searches["prose"].table
    drawn = table.losses[..., table.with_big(figures["4a"]["big"])].mean(1)  # all patterns of that many big layers
    if len(found["patterns"]) == drawn.shape[1]:
        expected = estimate(drawn.T[None], study.files["prose"], statistic=min)
        assert found["best_random"]["mean_interval"] == pytest.approx(expected.interval)
    assert found["best_random"]["mean"] == pytest.approx(min(found["patterns"]))


def test_evenly_is_about_every_layer_and_no_points_prove_nothing(figures):
    turned = json.loads(json.dumps(figures))
    layers, half = turned["2b"]["texts"]["prose"]["per_layer"], turned["2b"]["big"] / 3
    for shares, expected in (
        ([half] * 3, "agrees"),
        ([half + 0.1, half - 0.1, half], "agrees"),
        ([half + 0.3, half - 0.6, half + 0.3], "disagrees"),
    ):
        layers["mean"], layers["mean_interval"] = shares, [[share - 0.01, share + 0.01] for share in shares]
        assert verdict_of(turned, "evenly") == expected
    turned["4b"]["texts"]["prose"]["routed"]["soft"] = turned["4b"]["texts"]["prose"]["routed"]["soft"][:1]
    assert verdict_of(turned, "the learned router improves") == "open"


def test_every_figure_becomes_a_picture_and_its_numbers(figures, tmp_path):
    draw(figures, tmp_path)
    for name in FIGURES:
        assert (tmp_path / f"figure-{name}.png").stat().st_size > 5000
        assert json.loads((tmp_path / f"figure-{name}.json").read_text()) == json.loads(json.dumps(figures[name]))


def test_the_search_of_a_deep_model_lies_between_the_oracle_and_fixed_patterns(study, windows):
    """For every number of big layers; its losses are those of its routes, and of patterns those of the patterns."""
    text, patterns = windows[4:8], study.patterns
    exact = Exhaustive(study.model, text)
    searched = Searched(study.model, text, patterns, [1, 2], batch=3)
    for big in range(4):
        routes, losses = searched.routes(big), searched.losses(big)
        assert ((routes == 2).sum(-1) == big).all() and ((routes == 1).sum(-1) == 3 - big).all()
        assert torch.allclose(losses, reference_losses(study.model, text, routes), atol=1e-5)
        fixed = exact.table.losses[..., exact.table.index_of(torch.tensor(patterns[big]))]
        assert (losses >= exact.losses(big) - 1e-5).all() and (losses <= fixed + 1e-5).all()
    budget = torch.arange(13) % 4
    assert torch.equal(searched.losses(budget)[:, 5], searched.losses(int(budget[5]))[:, 5])
    drawn = searched.draw(2, 50, torch.Generator().manual_seed(0))
    assert sorted(drawn.tolist()) == [[1, 2, 2], [2, 1, 2], [2, 2, 1]]
    assert torch.allclose(searched.of_patterns(drawn), exact.of_patterns(drawn), atol=1e-5)


def test_a_study_without_an_oracle_says_so_and_claims_no_more_than_a_bound_can(figures):
    bounded = small_study(exact=False).run()
    assert sorted(bounded) == FIGURES and {numbers["bound"] for numbers in bounded.values()} == {"lower bound"}
    assert bounded["2a"]["router"] == "lower bound of the oracle's return"
    assert "oracle" not in bounded["4b"]["texts"]["prose"]["routed"]
    for exact, found in zip(claims(figures), claims(bounded), strict=True):
        assert (exact.oracle is None) == ("in place of the oracle" not in found.measured)
        assert found.verdict.name in {None: ("agrees", "disagrees", "open"), "below": ("agrees", "open")}.get(
            exact.oracle, ("open",)
        )
    assert "too many to enumerate" in claims_page(bounded, model="a model", command="duorl paper")


# Figure 8


RECIPE = PretrainOptions(
    out="",
    corpus="stdlib-docs",
    vocab_size=300,
    window=32,
    evaluation_windows=4,
    backbone={"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
              "num_attention_heads": 2},
    training={"max_steps": 3, "per_device_train_batch_size": 2, "report_to": "none", "disable_tqdm": True},
)  # fmt: skip


def test_dense_models_train_where_the_command_says(tmp_path):
    where = {"device": "cpu", "dtype": "bfloat16"}
    jobs = cli_dense.plan(dense.DenseOptions(RECIPE), tmp_path, where)
    assert all(where.items() <= job.arguments.items() for job in jobs)


def test_dense_models_have_the_duos_flops(tmp_path):
    jobs = dense.plan(RECIPE, (0.0, 0.25, 1.0), tmp_path)
    assert list(jobs) == ["duo", "dense-4", "dense-19", "dense-64", "frozen"]
    for share, size in ((0.0, 4), (0.25, 19), (1.0, 64)):
        assert dense.dense_size(RECIPE, share) == size == 4 + share * 60
        assert jobs[f"dense-{size}"].big_share == 1 and jobs[f"dense-{size}"].backbone["intermediate_size"] == size


@pytest.mark.slow
def test_the_dense_study_trains_measures_and_leaves_the_frozen_part_alone(tmp_path, small_corpus):
    recipe = replace(RECIPE, corpus=small_corpus)
    options = dense.DenseOptions(recipe, shares=(0.0, 1.0), texts=(small_corpus,), windows=4)
    for job in dense.plan(recipe, options.shares, tmp_path).values():
        Pretraining(job).train()
    rows = dense.measure_all(options, tmp_path)
    assert [(row["model"], row["big_share"]) for row in rows] == [
        ("dense-4", 0.0), ("dense-64", 1.0), ("duo", 0.0), ("duo", 1.0), ("frozen", 0.0), ("frozen", 1.0),
    ]  # fmt: skip
    big, frozen = duorl.load(tmp_path / "dense-64"), duorl.load(tmp_path / "frozen")
    for (name, before), after in zip(big.named_parameters(), frozen.parameters(), strict=True):
        assert torch.equal(before, after) == (".small." not in name), name
    found = {(row["model"], row["big_share"]): row for row in rows}
    assert found["frozen", 1.0]["loss"] == found["dense-64", 1.0]["loss"]
    tokenizer = duorl.load_tokenizer(tmp_path / "duo")
    text = duorl.load_windows(small_corpus, tokenizer, split="evaluation", length=32)[:4]
    expected = measure(duorl.load(tmp_path / "duo"), ConstantRouter("small"), text).loss.mean().item()
    assert found["duo", 0.0]["loss"] == pytest.approx(expected, abs=1e-5)
    assert 0 <= found["duo", 0.0]["accuracy"] <= 1 and math.isfinite(found["duo", 1.0]["rival"]["accuracy"])
    figures = scaling(rows, {"prose": small_corpus})
    assert list(figures) == ["8a", "8c"]
    draw(figures, tmp_path)


def test_a_missing_dense_study_is_named(tmp_path):
    assert dense.find(None, tmp_path, ["stdlib-docs"]) == []
    with pytest.raises(FileNotFoundError, match=r"no dense\.json at .*make one with duorl dense"):
        dense.find(str(tmp_path), tmp_path, ["stdlib-docs"])
