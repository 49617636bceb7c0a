"""The oracle against naive enumeration: one full forward per route."""

import itertools
import subprocess
import sys

import pytest
import torch
from conftest import make_duo, random_routes
from test_routed_pass import reference_losses, routed_losses
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

import duorl
from duorl import oracle
from duorl.closeness import same_token
from duorl.models import load
from duorl.oracle import search
from duorl.oracle.patterns import pattern_losses
from duorl.routed_pass import RoutedPass

BOTH, ALL = ("small", "big"), ("skip", "small", "big")
NAIVE = {"reference": reference_losses, "uniform": routed_losses}


def every_route(model, actions):
    codes = [oracle.search.action_ids(actions).tolist()] * model.num_layers
    return torch.tensor(list(itertools.product(*codes)))


def compute_of(model, routes):
    return sum(model.action_compute[layer][routes[..., layer]] for layer in range(model.num_layers))


def naive_routed(model, tokens, routes, cost_of):
    """Token by token: all routes of one token given the committed ones before it, then commit the least cost."""
    count, length = tokens.shape[0], tokens.shape[1] - 1
    chosen = torch.zeros(count, length, model.num_layers, dtype=torch.long)
    losses = torch.empty(count, length, len(routes))
    for t in range(length):
        for number, route in enumerate(routes):
            tried = chosen[:, : t + 1].clone()
            tried[:, t] = route
            losses[:, t, number] = routed_losses(model, tokens[:, : t + 2], tried)[:, -1]
        chosen[:, t] = routes[cost_of(losses[:, t], t).argmin(-1)]
    return losses, chosen


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "mistral"])
@pytest.mark.parametrize("context", NAIVE)
@pytest.mark.parametrize("actions", [BOTH, ALL], ids=len)
@pytest.mark.parametrize("states", [4096, 7])  # wide, and depth first from the first layer on
def test_exhaustive_equals_naive_enumeration(family, context, actions, states, tokens, monkeypatch):
    monkeypatch.setattr(search, "_STATES_AT_ONCE", states)
    model = make_duo(family)
    table = oracle.exhaustive(model, tokens, context=context, actions=actions)
    assert torch.equal(table.routes, every_route(model, actions))
    for number, route in enumerate(table.routes):
        everywhere = route.expand(2, 7, -1).contiguous()
        expected = NAIVE[context](model, tokens, everywhere)
        assert torch.allclose(table.losses[..., number], expected, atol=2e-5)
    assert torch.allclose(table.compute, compute_of(model, table.routes))


@pytest.mark.parametrize("family", ["llama", "bloom", "gemma2"])
@pytest.mark.parametrize("actions", [BOTH, ALL], ids=len)
@pytest.mark.parametrize("states", [4096, 7])  # both windows side by side, or one after the other, depth first
def test_routed_search_equals_naive_enumeration_token_by_token(family, actions, states, tokens, monkeypatch):
    monkeypatch.setattr(search, "_STATES_AT_ONCE", states)
    model = make_duo(family)
    routes = every_route(model, actions)
    expected, chosen = naive_routed(model, tokens, routes, lambda losses, t: losses + 0.3 * compute_of(model, routes))
    table = oracle.exhaustive(model, tokens, context="routed", actions=actions, price=0.3)
    assert torch.allclose(table.losses, expected, atol=2e-5)
    assert torch.equal(table.routes[table.committed], chosen)
    deployed = routed_losses(model, tokens, chosen)
    assert torch.allclose(table.loss(table.committed), deployed, atol=2e-5)


def test_routed_search_under_a_budget_that_changes_along_the_sequence(duo, tokens):
    budgets = torch.tensor([3, 3, 2, 2, 1, 1, 0])
    routes = every_route(duo, BOTH)
    big = (routes == 2).sum(1)
    expected, chosen = naive_routed(
        duo, tokens, routes, lambda losses, t: losses.masked_fill(big != budgets[t], torch.inf)
    )
    plain = oracle.exhaustive(duo, tokens[:1, :2])
    table = oracle.exhaustive(duo, tokens, context="routed", allowed=plain.with_big(budgets))
    assert torch.allclose(table.losses, expected, atol=2e-5)
    assert torch.equal(table.routes[table.committed], chosen)


@pytest.mark.parametrize("context", ["reference", "uniform", "routed"])
@pytest.mark.parametrize("actions", [BOTH, ALL], ids=len)
def test_the_search_executes_the_trees_flops(duo, tokens, context, actions):
    """Counted three times: in closed form, by the search, and by torch as the products are executed."""
    with FlopCounterMode(display=False) as counter:
        table = oracle.exhaustive(duo, tokens, context=context, actions=actions)
    flops, positions, commits = duo.flops, [7.0] * 14, 0.0
    if context == "routed":
        positions = [float(t + 1) for t in range(7)] * 2
        commits = 3 * sum(flops.attention(0, t) for t in positions)
        routes = table.routes[table.committed]
        commits += sum(flops.ffns[layer][routes[..., layer]].sum().item() for layer in range(2))
    tree = sum(oracle.tree_flops(duo, actions, count) for count in positions)
    assert table.flops == tree + commits

    # An all-big pass makes what the tokens read first. Torch does not count its fused attention, which uniform is.
    fused = 14 * 4 * flops.width * 7
    if context == "uniform":
        uncounted = sum(len(actions) ** layer for layer in range(3)) * fused
        assert counter.get_total_flops() == tree - uncounted
    else:
        all_big = 14 * sum(flops.attention(layer, 7) + flops.ffns[layer, 2].item() for layer in range(3))
        assert counter.get_total_flops() == tree + commits + all_big - 3 * fused


def test_the_tree_saves_what_prefixes_share(duo):
    """Against A^L full passes: at layer l it runs A^l attentions in place of A^L."""
    flops = duo.flops
    small, big = flops.ffns[0, 1].item(), flops.ffns[0, 2].item()
    expected = 7 * (flops.attention(0, 9) + small + big) + 8 * flops.head
    assert oracle.tree_flops(duo, BOTH, 9) == expected


@pytest.fixture(scope="module")
def table():
    generator = torch.Generator().manual_seed(0)
    routes = torch.cartesian_prod(*[torch.tensor([1, 2])] * 4)
    compute = (routes == 2).float().mean(1) * 0.9 + 0.1
    return oracle.RouteTable(routes, torch.rand(3, 5, 16, generator=generator), compute, "reference")


def test_best_is_the_minimum_of_loss_plus_price(table):
    for price in (0.0, 0.1, 10.0):
        best = table.best(price)
        for b, t in itertools.product(range(3), range(5)):
            costs = [table.losses[b, t, r] + price * table.compute[r] for r in range(16)]
            assert best[b, t] == min(range(16), key=lambda r: costs[r])


def test_budgets_choose_among_their_routes_only(table):
    for k in range(5):
        exactly = table.best(allowed=table.with_big(k))
        assert ((table.routes[exactly] == 2).sum(-1) == k).all()
        at_most = table.loss(table.best(allowed=table.with_big(k, at_most=True)))
        assert (at_most <= table.loss(exactly)).all()


def test_a_budget_that_changes_along_the_sequence_holds_at_every_position(table):
    budgets = torch.tensor([4, 3, 2, 1, 0])
    best = table.best(allowed=table.with_big(budgets))
    assert torch.equal((table.routes[best] == 2).sum(-1), budgets.expand(3, -1))
    for t, k in enumerate(budgets.tolist()):
        assert torch.equal(best[:, t], table.best(allowed=table.with_big(k))[:, t])


def test_a_compute_limit_is_kept_and_used(table):
    for limit in (0.1, 0.5, 0.55, 1.0):
        best = table.best(allowed=table.within(limit))
        assert (table.compute[best] <= limit + 1e-6).all()
        inside = table.losses[..., table.compute <= limit + 1e-6]
        assert torch.equal(table.loss(best), inside.min(-1).values)
    limits = torch.tensor([0.1, 0.325, 0.55, 0.775, 1.0])
    spent = table.compute[table.best(allowed=table.within(limits))]
    assert (spent <= limits + 1e-6).all()
    with pytest.raises(ValueError, match="no route"):
        table.best(allowed=table.within(0.05))
    with pytest.raises(ValueError, match="one route for all tokens has one budget"):
        table.best_fixed(allowed=table.within(limits))


def test_the_frontier_is_that_of_all_prices(table):
    frontier = table.frontier()
    assert (frontier.price.diff()[1:] <= 0).all() and (frontier.compute.diff() > 0).all()
    for price in (0.01, 0.05, 0.2, 0.7, 3.0):
        best = table.best(price)
        loss, compute = table.loss(best).mean().item(), table.compute[best].mean().item()
        last = int((frontier.price > price).sum()) - 1
        assert frontier.loss[last].item() == pytest.approx(loss, abs=1e-6)
        assert frontier.compute[last].item() == pytest.approx(compute, abs=1e-6)
    assert frontier.loss[-1].item() == pytest.approx(table.losses.min(-1).values.mean().item(), abs=1e-6)


def test_best_fixed_and_random_lie_between_oracle_and_average(table):
    oracle_loss = table.loss(table.best()).mean()
    sampled = table.loss(table.best_of_random(4, generator=torch.Generator().manual_seed(0))).mean()
    fixed = table.losses[..., table.best_fixed()].mean()
    assert oracle_loss <= sampled <= table.losses.mean()
    assert fixed == table.losses.mean((0, 1)).min()


def test_random_routes_are_drawn_among_the_allowed(table):
    generator = torch.Generator().manual_seed(0)
    some = table.best_of_random(3, generator=generator, allowed=table.with_big(2))
    assert ((table.routes[some] == 2).sum(-1) == 2).all() and len(some.unique()) <= 3
    every = table.best_of_random(6, generator=generator, allowed=table.with_big(2))
    assert torch.equal(every, table.best(allowed=table.with_big(2)))


def test_index_of_finds_routes_and_refuses_others(table):
    assert torch.equal(table.index_of(table.routes.flip(0)), torch.arange(15, -1, -1))
    with pytest.raises(ValueError, match="not searched with"):
        table.index_of(torch.tensor([[0, 1, 1, 1]]))


def test_a_search_without_end_is_refused():
    assert oracle.count_routes(10, ALL) == 3**10
    with pytest.raises(ValueError, match="too many to enumerate"):
        oracle.count_routes(30, BOTH)


def test_an_empty_choice_and_an_unknown_context_are_refused(table, duo, tokens):
    with pytest.raises(ValueError, match="no route"):
        table.best(allowed=table.with_big(9))
    with pytest.raises(ValueError, match="unknown context 'causal'"):
        oracle.exhaustive(duo, tokens, context="causal")


def test_a_memory_limit_that_nothing_fits_in_is_refused_with_what_is_needed(duo, tokens):
    with pytest.raises(ValueError, match=r"memory_limit 1,000 is too small: a table of 14 tokens and 8 routes.* need"):
        oracle.exhaustive(duo, tokens, memory_limit=1000)


_PEAK = """
import re, sys
import torch
from transformers import LlamaConfig
import duorl
from duorl.models import DuoConfig
from duorl.oracle import exhaustive
torch.set_num_threads(1)
sizes = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "vocab_size": 512}
def model(layers):
    backbone = LlamaConfig(num_hidden_layers=layers, num_key_value_heads=4, **sizes)
    return duorl.DuoForCausalLM(DuoConfig(backbone=backbone, small_size=32)).eval().requires_grad_(False)
tokens = torch.randint(512, (1, 17))
exhaustive(model(2), tokens, context=sys.argv[1])  # what torch itself takes for good
deep = model(int(sys.argv[2]))
def peak():  # unlike getrusage's, it starts anew with the program
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
before = peak()
exhaustive(deep, tokens, context=sys.argv[1], memory_limit=int(sys.argv[3]))
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("context", "layers"), [("reference", 6), ("reference", 11), ("uniform", 11), ("routed", 11)])
def test_the_memory_limit_is_kept_whatever_the_depth(context, layers):
    """By the peak of the process's resident memory."""
    limit = 30_000_000
    command = [sys.executable, "-c", _PEAK, context, str(layers), str(limit)]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert 0 < grown <= limit


# Approximate oracles


def found(method, model, tokens, context, **options):
    special = {
        oracle.descent: {"start": [2] * model.num_layers},
        oracle.best_of_random: {"generator": torch.Generator().manual_seed(0), "count": 4},
    }
    return method(model, tokens, context=context, price=0.3, **{**special.get(method, {}), **options})


@pytest.mark.parametrize("method", [oracle.beam, oracle.descent, oracle.best_of_random])
@pytest.mark.parametrize("context", ["reference", "routed"])
@pytest.mark.parametrize("actions", [BOTH, ALL], ids=len)
def test_approximate_oracles_report_what_their_routes_really_lose(method, context, actions, duo, tokens):
    result = found(method, duo, tokens, context, actions=actions)
    naive = {"reference": reference_losses, "routed": routed_losses}[context]
    assert torch.allclose(result.losses, naive(duo, tokens, result.routes), atol=2e-5)
    assert torch.allclose(result.compute, compute_of(duo, result.routes))
    assert result.lower_bound and result.flops > 0 and result.seconds > 0
    if context == "reference":
        table = oracle.exhaustive(duo, tokens, actions=actions)
        best = table.best(0.3)
        assert (table.loss(best) + 0.3 * table.compute[best] <= result.losses + 0.3 * result.compute + 1e-5).all()


@pytest.mark.parametrize("context", ["reference", "routed"])
@pytest.mark.parametrize("actions", [BOTH, ALL], ids=len)
def test_with_enough_width_the_beam_is_the_exhaustive_oracle(context, actions, duo, tokens):
    result = oracle.beam(duo, tokens, width=len(actions) ** 2, price=0.3, actions=actions, context=context)
    table = oracle.exhaustive(duo, tokens, price=0.3, actions=actions, context=context)
    best = table.best(0.3)
    assert torch.equal(result.routes, table.routes[best])
    assert torch.allclose(result.losses, table.loss(best), atol=1e-5)


def test_a_narrow_beam_keeps_the_prefixes_that_predict_best(duo, tokens):
    """Width 1: greedy by the intermediate prediction, redone here layer by layer."""
    walk = RoutedPass(duo, tokens, context="reference")
    chosen = []
    while not walk.done:
        scores = []
        for action in (1, 2):
            child = walk.fork()
            child.take(action)
            scores.append(child.losses(child.layer_input) + 0.3 * child.compute)
        chosen.append(1 + torch.stack(scores).argmin(0))
        walk.step(chosen[-1])
    assert torch.equal(oracle.beam(duo, tokens, width=1, price=0.3).routes, torch.stack(chosen, -1))


@pytest.mark.parametrize("actions", [BOTH, ALL], ids=len)
def test_descent_ends_where_no_single_change_helps(duo, tokens, actions):
    result = found(oracle.descent, duo, tokens, "reference", actions=actions, rounds=20)
    table = oracle.exhaustive(duo, tokens, actions=actions)
    cost = result.losses + 0.3 * result.compute
    for layer in range(3):
        for action in oracle.search.action_ids(actions).tolist():
            changed = result.routes.clone()
            changed[..., layer] = action
            index = table.index_of(changed)
            assert (cost <= table.loss(index) + 0.3 * table.compute[index] + 1e-5).all()


def test_a_descent_starts_with_the_best_of_several_patterns_however_many_windows_run_at_once(duo, tokens, monkeypatch):
    starts, table = [[1, 1, 1], [2, 1, 2], [1, 2, 1]], oracle.exhaustive(duo, tokens)
    index = table.index_of(torch.tensor(starts))
    result = oracle.descent(duo, tokens, start=starts, price=0.3)
    at_starts = (table.losses + 0.3 * table.compute)[..., index].min(-1).values
    assert (result.losses + 0.3 * result.compute <= at_starts + 1e-5).all()
    monkeypatch.setattr(oracle.approximate, "states_within", lambda *_: tokens.shape[1] - 1)
    one_by_one = oracle.descent(duo, tokens, start=starts, price=0.3)
    assert torch.equal(one_by_one.routes, result.routes)
    assert torch.allclose(one_by_one.losses, result.losses, atol=1e-5)


def test_more_random_routes_are_never_worse(duo, tokens):
    few, many = (
        oracle.best_of_random(duo, tokens, count=count, generator=torch.Generator().manual_seed(0)) for count in (3, 50)
    )
    assert (many.losses <= few.losses + 1e-6).all()


def test_a_start_that_is_not_a_route_is_refused(duo, tokens):
    with pytest.raises(ValueError, match="memory_limit 1,000 is too small"):
        oracle.descent(duo, tokens, start=[1, 1, 1], memory_limit=1000)
    with pytest.raises(ValueError, match=r"start must be 3 codes out of \[1, 2\], not \[1, 0, 1\]"):
        oracle.descent(duo, tokens, start=[[1, 1, 1], [1, 0, 1]])
    with pytest.raises(ValueError, match="start must be 3 codes"):
        oracle.descent(duo, tokens, start=[1, 1])


# Fixed patterns


@pytest.mark.parametrize("actions", [BOTH, ALL, ("skip", "big")], ids=str)
def test_enumerated_patterns_are_the_best_of_every_budget(actions, duo, tokens):
    patterns = oracle.fixed_patterns(duo, tokens, actions=actions)
    table = oracle.exhaustive(duo, tokens, context="uniform", actions=actions)
    means = table.losses.mean((0, 1))
    codes = oracle.search.action_ids(actions)
    budgets = torch.stack([(table.routes == code).sum(1) for code in codes], -1)
    assert len(patterns) == len(budgets.unique(dim=0))
    for pattern in patterns:
        among = (budgets == torch.tensor(pattern.budget)).all(1)
        assert pattern.loss == pytest.approx(means[among].min().item(), abs=1e-5)
        index = table.index_of(torch.tensor(pattern.route))
        assert among[index] and pattern.compute == pytest.approx(table.compute[index].item())


@pytest.mark.parametrize("method", ["enumeration", "program", "greedy"])
def test_patterns_for_drafts_are_the_best_by_acceptance(method, duo, tokens):
    by_text, all_big = oracle.fixed_patterns(duo, tokens), duo(input_ids=tokens[:, :-1]).logits.argmax(-1)
    patterns = oracle.fixed_patterns(duo, tokens, method=method, closeness=same_token)

    def acceptance(route):
        routes = torch.tensor(route).expand(*all_big.shape, -1)
        return (duo(input_ids=tokens[:, :-1], routes=routes).logits.argmax(-1) == all_big).float().mean().item()

    for pattern in patterns:
        assert -pattern.loss == pytest.approx(acceptance(pattern.route), abs=1e-6)
        if method == "enumeration":
            rival = next(other for other in by_text if other.budget == pattern.budget)
            assert acceptance(pattern.route) >= acceptance(rival.route)
    assert acceptance([1] * duo.num_layers) < -patterns[-1].loss == 1.0


@pytest.mark.parametrize("actions", [BOTH, ALL], ids=len)
def test_the_program_finds_a_pattern_for_every_budget_and_few_worse_ones(actions, duo, tokens):
    exact = {pattern.budget: pattern for pattern in oracle.fixed_patterns(duo, tokens, actions=actions)}
    program = {p.budget: p for p in oracle.fixed_patterns(duo, tokens, actions=actions, method="program")}
    assert program.keys() == exact.keys()
    for budget, pattern in program.items():
        assert pattern.loss >= exact[budget].loss - 1e-5
        deployed = pattern_losses(duo, tokens, torch.tensor([pattern.route]))
        assert pattern.loss == pytest.approx(deployed.item(), abs=1e-5)
    one_big = [budget for budget in exact if budget[-1] == 1 and sum(budget[1:]) == 1]
    for budget in one_big:  # with one dear layer the program tries them all
        assert program[budget].route == exact[budget].route


def test_the_program_tries_a_triangle_of_patterns(duo, tokens, monkeypatch):
    tried = []
    monkeypatch.setattr(
        "duorl.oracle.patterns._Trials._losses", lambda trials, routes: tried.extend(routes) or [0.0] * len(routes)
    )
    oracle.fixed_patterns(duo, tokens, method="program")
    assert len(tried) == 1 + 3 * 4 / 2


@pytest.mark.slow
def test_thirty_layers_are_within_reach(tokens):
    """Where 2^30 routes cannot be enumerated: the program's patterns, and searches that start from them."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(0)
    original = LlamaForCausalLM(LlamaConfig(num_hidden_layers=30, vocab_size=61, initializer_range=0.2, **sizes))
    model = duorl.convert(original.eval(), small_ratio=4).requires_grad_(False)
    with pytest.raises(ValueError, match="too many to enumerate"):
        oracle.exhaustive(model, tokens)
    patterns = oracle.fixed_patterns(model, tokens, method="program")
    assert [pattern.budget for pattern in patterns] == [(30 - big, big) for big in range(31)]
    start = min(patterns, key=lambda pattern: pattern.loss)
    assert start.loss < min(patterns[0].loss, patterns[-1].loss)
    everywhere = torch.tensor(start.route).expand(2, 7, -1).contiguous()
    before = reference_losses(model, tokens, everywhere)
    for result in (
        oracle.descent(model, tokens, start=start.route, rounds=1),
        oracle.beam(model, tokens, width=4),
    ):
        assert torch.allclose(result.losses, reference_losses(model, tokens, result.routes), atol=2e-5)
        if result.method.startswith("descent"):
            assert (result.losses <= before + 1e-5).all() and result.losses.mean() < before.mean() - 0.05


# skip="block"


def test_skipping_a_block_is_the_model_without_it(duo, tokens):
    block = make_duo("llama")
    block.config.skip = "block"
    routes = torch.full((2, 8, 3), 2)
    routes[..., 1] = 0
    found = block(input_ids=tokens, routes=routes).logits
    shorter = make_duo("llama")
    del shorter.backbone.model.layers[1]
    for index, layer in enumerate(shorter.backbone.model.layers):
        layer.self_attn.layer_idx = index
    assert torch.allclose(found, shorter.backbone(input_ids=tokens).logits, atol=1e-5)
    assert not torch.allclose(found, duo(input_ids=tokens, routes=routes).logits, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2", "granite"])
def test_passes_and_search_drop_blocks_as_the_model_does(family, tokens):
    model = make_duo(family)
    model.config.skip = "block"
    routes = random_routes(model, tokens)
    for context, naive in (("routed", routed_losses), ("reference", reference_losses)):
        walk = RoutedPass(model, tokens, context=context)
        mixed = RoutedPass(model, tokens, context=context)
        while not walk.done:
            mixed.mix(torch.nn.functional.one_hot(routes[..., walk.layer], 3).float(), (0, 1, 2))
            walk.step(routes[..., walk.layer])
        assert torch.allclose(walk.losses(), naive(model, tokens, routes), atol=2e-5)
        assert torch.allclose(mixed.losses(), walk.losses(), atol=2e-5)
    table = oracle.exhaustive(model, tokens, actions=ALL)
    for number in (0, 5, 13, 21):
        everywhere = table.routes[number].expand(2, 7, -1).contiguous()
        assert torch.allclose(table.losses[..., number], reference_losses(model, tokens, everywhere), atol=2e-5)


def test_dropping_a_block_costs_what_skipping_its_network_costs(duo, tokens):
    """Attention has run when the decision is taken, and later tokens read it: nothing more is saved."""
    block = make_duo("llama")
    block.config.skip = "block"
    flops = [oracle.exhaustive(model, tokens, actions=ALL).flops for model in (duo, block)]
    assert flops[0] == flops[1]
    assert torch.equal(duo.action_compute, block.action_compute)


def test_what_skip_drops_is_saved_with_the_model_and_can_be_changed(duo, tmp_path):
    block = make_duo("llama")
    block.config.skip = "block"
    block.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert load(tmp_path).config.skip == "block"
    assert load(tmp_path, skip="ffn").config.skip == "ffn"
    with pytest.raises(ValueError, match="skip drops ffn or block, not 'half'"):
        load(tmp_path, skip="half")
