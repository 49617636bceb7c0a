"""What an evaluation searches: the fixed patterns, the bound, and the choice of both by cost."""

from dataclasses import replace

import pytest
import torch
from conftest import make_duo
from rich.console import Console
from test_routed_pass import reference_losses
from transformers import LlamaConfig, LlamaForCausalLM

import duorl
from duorl.evaluation import (
    Baseline,
    Comparer,
    EvaluationOptions,
    RouteSearchOptions,
    choose,
    choose_starts,
    find_bound,
    flops_per_second,
    measure,
    plan_route_search,
    search_windows,
    summarize,
)
from duorl.evaluation.cache import fingerprint
from duorl.evaluation.frontier import best_at
from duorl.oracle import descent, descent_flops, exhaustive, fixed_patterns, tree_flops
from duorl.oracle.patterns import pattern_count, pattern_losses, search_patterns
from duorl.reports.figures import frontier, markdown, table
from duorl.routers import ConstantRouter, MixedRouter, ReplayRouter

BOTH, ALL = ("small", "big"), ("skip", "small", "big")
FEW = EvaluationOptions(windows=12, reference_windows=4, fixed_windows=6, finalists=3, final_windows=12, batch=5)


class Names:
    """Stands for a tokenizer of the 61 tokens."""

    def decode(self, tokens):
        return f"t{tokens[0]}"


@pytest.fixture(scope="module")
def windows():
    return torch.randint(61, (24, 8), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def deep():
    """24 random layers."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(0)
    original = LlamaForCausalLM(LlamaConfig(num_hidden_layers=24, vocab_size=61, initializer_range=0.2, **sizes))
    return duorl.convert(original.eval(), small_ratio=4).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tiny():
    """duo-tiny, and windows of the router and of the evaluation split."""
    tokenizer = duorl.load_tokenizer("duo-tiny")
    read = [
        duorl.load_windows(["stdlib-code"], tokenizer, split=split, length=128) for split in ("router", "evaluation")
    ]
    return duorl.load("duo-tiny"), *read


# Fixed patterns


def naive_best(model, windows, actions, price, allowed=lambda route: True):
    """The cheapest pattern by one full pass each."""
    found = exhaustive(model, windows[:1], context="uniform", actions=actions)
    routes = [route for route in found.routes.tolist() if allowed(route)]
    losses = pattern_losses(model, windows, torch.tensor(routes)).tolist()
    spent = [sum(model.action_compute[layer, code].item() for layer, code in enumerate(route)) for route in routes]
    costs = [loss + price * compute for loss, compute in zip(losses, spent, strict=True)]
    return routes[costs.index(min(costs))]


@pytest.mark.parametrize("actions", [BOTH, ALL, ("skip", "big")], ids=str)
def test_enumeration_finds_the_best_pattern_for_a_price_a_number_and_a_compute(duo, windows, actions):
    options = replace(FEW, fixed_windows=12, finalists=27)
    baseline = Baseline.search(duo, windows[:12], method="enumeration", actions=actions, price=0.1, options=options)
    assert baseline.at_price(0.1) == naive_best(duo, windows[:12], actions, 0.1)
    for big, route in baseline.per_big().items():
        assert route == naive_best(duo, windows[:12], actions, 0.0, lambda r, big=big: r.count(2) == big)
    routes = torch.tensor(list(baseline.per_big().values()))
    spends, losses = duo.route_compute(routes).double().numpy(), pattern_losses(duo, windows[:12], routes).numpy()
    target = (spends.min() + spends.max()) / 2
    mixed = baseline.mixed(target)
    parts = mixed.parts if isinstance(mixed, MixedRouter) else [mixed]
    weights = mixed.config.get("shares", [1.0])
    places = [routes.tolist().index(part.config["route"]) for part in parts]
    assert sum(w * losses[p] for w, p in zip(weights, places, strict=True)) == pytest.approx(
        best_at(spends, losses, target), abs=1e-6
    )
    with pytest.raises(ValueError, match=r"fixed patterns spend .* to .*, not -1"):
        baseline.mixed(-1)


@pytest.mark.parametrize("method", ["program", "greedy"])
@pytest.mark.parametrize("actions", [BOTH, ALL, ("skip", "small"), ("big",)], ids=str)
def test_searched_patterns_say_what_they_lose_and_cover_every_number_of_big_layers(duo, windows, method, actions):
    tried = search_patterns(duo, windows[:4], actions=actions, method=method, price=0.1)
    assert len(tried) <= pattern_count(3, actions, method)
    losses = pattern_losses(duo, windows[:4], torch.tensor(list(tried)))
    assert list(tried.values()) == pytest.approx(losses.tolist(), abs=1e-6)
    enumerated = Baseline.search(duo, windows[:4], method="enumeration", actions=actions, price=0.1, options=FEW)
    searched = Baseline.search(duo, windows[:4], method=method, actions=actions, price=0.1, options=FEW)
    assert searched.per_big().keys() == enumerated.per_big().keys()


def test_the_greedy_search_is_exact_where_there_is_little_to_search(duo, windows):
    exact = {p.budget: p for p in fixed_patterns(duo, windows)}
    greedy = {p.budget: p for p in fixed_patterns(duo, windows, method="greedy")}
    assert greedy.keys() == exact.keys()
    assert all(greedy[budget].route == exact[budget].route for budget in exact)


@pytest.mark.slow
def test_on_duo_tiny_the_greedy_search_is_as_good_as_enumeration_with_a_fifth_of_the_patterns(tiny):
    model, training, _ = tiny
    losses = {
        method: {p.budget: p.loss for p in fixed_patterns(model, training[:4], method=method)}
        for method in ("enumeration", "program", "greedy")
    }
    behind = {
        method: max(found[budget] - losses["enumeration"][budget] for budget in found)
        for method, found in losses.items()
    }
    assert 0 <= behind["greedy"] < 0.005  # over other windows up to 0.011
    assert 0 <= behind["program"] < 0.05
    assert len(search_patterns(model, training[:1, :33], actions=BOTH, method="greedy")) < 256 / 3


def test_shared_prefixes_bound_the_flops_of_any_set_of_patterns(duo):
    assert tree_flops(duo, BOTH, 7, routes=8) == tree_flops(duo, BOTH, 7)
    assert tree_flops(duo, BOTH, 7, routes=1) < tree_flops(duo, BOTH, 7, routes=3) < tree_flops(duo, BOTH, 7)
    flops = duo.flops
    networks = 3 * (flops.ffns[0, 1] + flops.ffns[0, 2]).item() / 2
    assert tree_flops(duo, BOTH, 7, routes=1) == 3 * flops.attention(0, 7) + networks + flops.head


@pytest.mark.parametrize("actions", [BOTH, ALL], ids=len)
def test_a_descent_executes_no_more_flops_than_are_foreseen(duo, windows, actions):
    found = descent(duo, windows[:2], start=[2, 2, 2], actions=actions)
    foreseen = descent_flops(duo, actions, 7) * 14
    assert 0.5 * foreseen < found.flops <= foreseen


# Bounds


def test_a_descent_is_below_the_oracle_and_is_deployed_on_its_windows(duo, windows):
    searched = windows[:4]
    exact, lower = (
        find_bound(method, duo, searched, price=0.1, actions=ALL, starts=[[1, 2, 1]])
        for method in ("exhaustive", "descent")
    )
    assert (exact.name, exact.kind, lower.name, lower.kind) == ("oracle", "exact", "lower bound", "lower bound")
    assert (exact.losses + 0.1 * exact.compute <= lower.losses + 0.1 * lower.compute + 1e-5).all()
    assert torch.allclose(lower.losses, reference_losses(duo, searched, lower.routes), atol=2e-5)
    assert [row["big"] for row in exact.frontier] == [0, 1, 2, 3] and lower.frontier == []
    assert torch.equal(measure(duo, lower.router, searched).routes, lower.routes)
    with pytest.raises(ValueError, match="on the windows that they were found for"):
        measure(duo, lower.router, windows[4:8])
    hard, easier = (bound.difficulty(duo, Names()) for bound in (exact, lower))
    assert len(hard) == len(easier) == 2 * 7
    for row, other in zip(hard, easier, strict=True):
        assert row.difficulty >= other.difficulty - 1e-5 and row.token == other.token
        assert row.all_small == pytest.approx(other.all_small, abs=1e-5)
    assert find_bound("none", duo, searched, price=0.1, actions=ALL, starts=[]) is None


def test_replayed_routes_are_saved_with_their_windows(duo, windows, tmp_path):
    routes = torch.randint(3, (2, 7, 3))
    ReplayRouter.of(windows[:2], routes).save_pretrained(tmp_path)
    assert torch.equal(measure(duo, duorl.routers.load(tmp_path), windows[:2]).routes, routes)


# The choice


def test_by_default_duo_tiny_is_enumerated_with_all_windows_and_three_actions_are_not(tiny):
    model, training, held_out = tiny
    choice = choose(model, training, held_out, actions=BOTH, options=EvaluationOptions())
    sizes = choice.options
    assert (choice.baseline, choice.bound, choice.notes) == ("enumeration", "exhaustive", ())
    assert (sizes.windows, sizes.reference_windows) == (256, 16)
    assert (sizes.fixed_windows, sizes.finalists, sizes.final_windows) == (32, 8, 128)
    assert "enumeration, all 256 patterns on 32 windows, the best 8 again on 128" in choice.rival
    assert "about" not in choice.text() and "about" in choice.text(1e11)
    three = choose(model, training, held_out, actions=ALL, options=EvaluationOptions())
    assert (three.baseline, three.bound) == ("greedy", "descent") and three.options.fixed_windows == 32
    assert "up to 352 of 6,561 patterns" in three.text(1e11)
    assert three.notes == ("6,561 routes are more than the 4,096 that are enumerated by default.",)
    assert "a lower bound of the oracle" in three.text()


def test_a_quick_evaluation_has_fewer_windows_and_says_so(tiny, deep):
    model, training, held_out = tiny
    choice = choose(model, training, held_out, actions=BOTH, options=EvaluationOptions(effort="quick"))
    assert (choice.options.windows, choice.options.fixed_windows, choice.options.finalists) == (64, 8, 2)
    assert "quick, enumeration, all 256 patterns on 8 windows, the best 2 again on 16" in choice.rival
    given = EvaluationOptions(effort="quick", finalists=5, windows=3).sized(8)
    assert (given.finalists, given.windows, given.reference_windows, given.final_windows) == (5, 3, 3, 16)
    assert EvaluationOptions().sized(24).windows == 32 and given.sized(24) == given
    with pytest.raises(ValueError, match="reference_windows 4 must be among the 3 windows"):
        EvaluationOptions(windows=3, reference_windows=4)


def test_a_search_is_kept_for_the_same_weights_text_and_options_alone(duo, windows, tmp_path, monkeypatch):
    monkeypatch.setenv("DUORL_CACHE", str(tmp_path))
    asked = {"method": "greedy", "actions": BOTH, "price": 0.1, "options": FEW}
    first = Baseline.search(duo, windows, **asked)
    patterns, state = first.per_big(), first.state()
    (file,) = tmp_path.iterdir()
    counts = []
    again = Baseline.search(duo, windows, **asked, tried=counts.append)
    assert again.state() == state and counts == [len(state["ranked"])]  # nothing is tried
    monkeypatch.setattr("duorl.evaluation.baseline.pattern_losses", None)  # the finals are kept too
    assert again.per_big() == patterns
    monkeypatch.undo()
    monkeypatch.setenv("DUORL_CACHE", str(tmp_path))
    file.write_text("broken")
    assert Baseline.search(duo, windows, **asked).per_big() == patterns
    others = [(windows.flip(0), asked), (windows, {**asked, "price": 0.2}), (windows, {**asked, "actions": ALL})]
    for text, options in others:
        Baseline.search(duo, text, **options)
    assert len(list(tmp_path.iterdir())) == 4
    changed = make_duo("llama")
    changed.stack.ffns[2].small.down_proj.weight.data[0, 0] += 1e-3
    assert fingerprint(changed) != fingerprint(duo) == fingerprint(make_duo("llama"))
    monkeypatch.setenv("DUORL_CACHE", "/proc/nowhere")  # nothing can be kept there
    assert Baseline.search(duo, windows, **asked).per_big() == patterns


def test_what_is_impossible_is_refused_only_where_it_was_asked_for_by_name(deep, windows):
    choice = choose(deep, windows[:12], windows[12:], actions=BOTH, options=FEW)
    assert (choice.baseline, choice.bound, choice.routes) == ("greedy", "descent", 2**24)
    assert choice.notes == ("2 actions in 24 layers make 1.7e+07 routes, too many to enumerate.",)
    for part, method, other in (("baseline", "enumeration", "greedy"), ("bound", "exhaustive", "descent")):
        options = replace(FEW, **{part: method})
        with pytest.raises(
            ValueError, match=f"evaluation.{part} {method} is impossible here, give {other}: .* too many"
        ):
            choose(deep, windows[:12], windows[12:], actions=BOTH, options=options)


def test_the_machines_speed_is_measured(duo, windows):
    assert flops_per_second(duo, windows) > 0


# From end to end


@pytest.fixture(scope="module")
def deep_comparer(deep, windows):
    return Comparer(deep, windows[:12], windows[12:], price=0.1, actions=ALL, reference="small", options=FEW)


def compared(comparer, name="x" * 60):
    routers = {name: [ConstantRouter("big")], "best fixed": [comparer.fixed], **comparer.bounds}
    return comparer.compare(routers, {"price": 0.1, "command": "duorl evaluate"})


def test_a_deep_model_is_compared_with_a_lower_bound(deep_comparer):
    comparison = compared(deep_comparer)
    rows = {row["router"]: row for row in comparison.rows}
    assert rows["lower bound"]["sees_label"] and rows["lower bound"]["bound"] == "lower bound"
    assert rows["lower bound"]["regret"] == pytest.approx(0, abs=1e-5) and rows["lower bound"]["agreement"] == 1
    assert rows["best fixed"]["regret"] >= -1e-5  # from which the descent starts
    assert comparison.frontiers["oracle"] == []
    assert [point["big"] for point in comparison.frontiers["fixed"]] == list(range(25))
    assert len(deep_comparer.baseline.per_big()) == 25
    assert "| regret (at least) | agree with bound |" in markdown(comparison)
    assert "agreement with coordinate descent in the reference" in table(comparison).caption
    assert "lower bound" in frontier(comparison).axes[0].get_title()
    traces = deep_comparer.traces(Names())
    assert len(traces["difficulty"]) == 2 * 7 and traces["bound"] == "lower bound"
    for row in traces["difficulty"]:
        assert row["difficulty"] == pytest.approx(row["all_small"] - row["lower_bound"]) and "oracle" not in row


def test_without_a_bound_there_is_no_regret(duo, windows):
    options = replace(FEW, bound="none")
    comparer = Comparer(duo, windows[:12], windows[12:], price=0.1, actions=BOTH, reference="small", options=options)
    comparison = compared(comparer)
    assert comparer.bounds == {}
    for row in comparison.rows:
        assert row["bound"] is row["regret"] is row["agreement"] is row["reference"] is None
    assert "no bound" in frontier(comparison).axes[0].get_title()
    traces = comparer.traces(Names())
    assert (traces["difficulty"], traces["bound"]) == ([], None)
    cells = markdown(comparison).splitlines()[2].split("|")
    assert cells[-3].strip() == cells[-2].strip() == ""


def printed(comparison, width):
    console = Console(width=width, file=open("/dev/null", "w"), record=True, force_terminal=False)  # noqa: SIM115
    console.print(table(comparison))
    return console.export_text()


@pytest.mark.parametrize("bound", ["descent", "none"])
@pytest.mark.parametrize("scale", [1, 1000])  # losses and returns of one digit, and of four
def test_numbers_are_never_cut_and_names_are(deep_comparer, bound, scale):
    comparison = compared(deep_comparer)
    for row in comparison.rows:
        row["loss"], row["return"] = scale * row["loss"], scale * row["return"]
        row["return_minus_fixed"] = scale * row["return_minus_fixed"]
        row["return_minus_fixed_interval"] = [scale * end for end in row["return_minus_fixed_interval"]]
        if bound == "none":
            row |= dict.fromkeys(("regret", "agreement", "reference", "bound"))
    text = printed(comparison, 80)
    assert max(map(len, text.splitlines())) <= 80
    assert "x" * 12 not in text and "xxxxx…" in text
    assert text.count("…") == 1  # nothing else was cut
    for row in comparison.rows:
        low, high = row["return_minus_fixed_interval"]
        assert f"{row['loss']:.3f}" in text and f"{row['return']:+.3f}" in text
        if row["router"] != "best fixed":
            assert f"({low:+.3f}, {high:+.3f})" in text
    assert "x" * 60 in printed(comparison, 200)


# `duorl oracle`


def searched(model, windows, options):
    method = plan_route_search(model, windows, options).method
    starts = choose_starts(model, windows, options) if method == "descent" else []
    found = search_windows(model, windows, options, method, starts)
    return summarize(model, windows, Names(), options, method, found)


@pytest.mark.slow
def test_a_search_is_exhaustive_or_a_lower_bound_that_says_so(duo, deep, windows):
    options = RouteSearchOptions(actions=ALL, price=0.1)
    exact = searched(duo, windows[:2], options)
    assert plan_route_search(duo, windows[:2], options).flops == 14 * tree_flops(duo, ALL, 7)
    assert exact.exact and len(exact.rows) == 4 and exact.numbers["bound"] == "exact" and len(exact.difficulty) == 14
    lower = searched(duo, windows[:2], replace(options, method="descent"))
    names = ((exact, "oracle"), (lower, "lower_bound"))
    spent = [found.numbers[name] + 0.1 * found.numbers[f"{name}_compute"] for found, name in names]
    assert spent[0] <= spent[1] + 1e-5 and lower.rows == [] and lower.numbers["bound"] == "lower bound"
    assert "descent is a lower bound of the oracle's return" in lower.summary
    assert plan_route_search(deep, windows[:2], options).method == "descent"
    assert searched(deep, windows[:1], options).method == "descent"
    with pytest.raises(ValueError, match=r"impossible here, give --method descent: .*too many"):
        plan_route_search(deep, windows[:2], replace(options, method="exhaustive"))
    with pytest.raises(ValueError, match="beam knows the reference and the routed context"):
        plan_route_search(duo, windows[:2], replace(options, method="beam", context="uniform"))
