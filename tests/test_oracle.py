"""The exhaustive oracle against naive enumeration: one full forward per route."""

import itertools

import pytest
import torch
from conftest import make_duo
from test_routed_pass import reference_losses, routed_losses

import duorl.oracle as oracle

NAIVE = {"reference": reference_losses, "uniform": routed_losses}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("context", NAIVE)
@pytest.mark.parametrize("actions", [("small", "big"), ("skip", "small", "big")])
@pytest.mark.parametrize("states", [4096, 30])  # wide, and depth first from the second layer on
def test_exhaustive_equals_naive_enumeration(family, context, actions, states, tokens, monkeypatch):
    monkeypatch.setattr(oracle, "_STATES_AT_ONCE", states)
    model = make_duo(family)
    table = oracle.exhaustive(model, tokens, context=context, actions=actions)
    codes = [oracle.action_ids(actions).tolist()] * model.num_layers
    assert table.routes.tolist() == [list(route) for route in itertools.product(*codes)]
    for number, route in enumerate(table.routes):
        everywhere = route.expand(2, 7, -1).contiguous()
        expected = NAIVE[context](model, tokens, everywhere)
        assert torch.allclose(table.losses[..., number], expected, atol=2e-5)
        spent = sum(model.action_compute[layer, action] for layer, action in enumerate(route))
        assert torch.allclose(table.compute[number], spent)


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


def test_best_fixed_and_random_lie_between_oracle_and_average(table):
    oracle_loss = table.loss(table.best()).mean()
    sampled = table.loss(table.best_of_random(4, generator=torch.Generator().manual_seed(0))).mean()
    fixed = table.losses[..., table.best_fixed()].mean()
    assert oracle_loss <= sampled <= table.losses.mean()
    assert fixed == table.losses.mean((0, 1)).min()


def test_index_of_finds_routes_and_refuses_others(table):
    assert torch.equal(table.index_of(table.routes.flip(0)), torch.arange(15, -1, -1))
    with pytest.raises(ValueError, match="not searched with"):
        table.index_of(torch.tensor([[0, 1, 1, 1]]))


def test_a_search_without_end_is_refused():
    assert oracle.count_routes(10, ("skip", "small", "big")) == 3**10
    with pytest.raises(ValueError, match="too many to enumerate"):
        oracle.count_routes(30, ("small", "big"))


def test_an_empty_choice_and_an_unknown_context_are_refused(table, duo, tokens):
    with pytest.raises(ValueError, match="no route"):
        table.best(allowed=table.with_big(9))
    with pytest.raises(ValueError, match="unknown context 'routed'"):
        oracle.exhaustive(duo, tokens, context="routed")
