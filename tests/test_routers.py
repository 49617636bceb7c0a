"""Routers: what they decide, that they survive saving, and that the taught ones learn."""

import json

import pytest
import torch

from duorl import routers
from duorl.envs import Lockstep
from duorl.evaluation.compare import measure
from duorl.learners import Soft, Supervised
from duorl.learners.soft import hardened, sharpness, soft_loss, soft_pass
from duorl.oracle import exhaustive
from duorl.rewards import LossImprovement
from duorl.routers import (
    ConstantRouter,
    HeadRouter,
    OracleRouter,
    PatternRouter,
    RandomRouter,
)
from duorl.routers.heads import LayerHeads


@pytest.fixture
def windows():
    return torch.randint(61, (8, 8), generator=torch.Generator().manual_seed(2))


def test_simple_routers_take_their_actions(duo, windows):
    assert (measure(duo, ConstantRouter("skip"), windows).routes == 0).all()
    assert measure(duo, PatternRouter([2, 0, 1]), windows).routes.flatten(0, 1).unique(dim=0).tolist() == [[2, 0, 1]]
    drawn = measure(duo, RandomRouter(("skip", "big"), seed=1), windows).routes
    assert drawn.unique().tolist() == [0, 2] and 0.3 < (drawn == 2).float().mean() < 0.7
    assert torch.equal(drawn, measure(duo, RandomRouter(("skip", "big"), seed=1), windows).routes)


def test_the_oracle_router_takes_each_tokens_best_route(duo, windows):
    table = exhaustive(duo, windows, context="reference")
    measured = measure(duo, OracleRouter(price=0.1), windows, context="reference")
    assert torch.allclose(measured.loss, table.loss(table.best(0.1)), atol=1e-5)


def test_a_uniform_table_ranks_patterns_as_deploying_them_does(duo, windows):
    table = exhaustive(duo, windows, context="uniform")
    losses = torch.stack([measure(duo, PatternRouter(route.tolist()), windows).loss.mean() for route in table.routes])
    assert torch.allclose(losses, table.losses.mean((0, 1)), atol=1e-5)
    assert torch.equal(losses[table.fixed_ranking()], losses.sort().values)


@pytest.mark.parametrize(
    "router",
    [
        ConstantRouter("big"),
        PatternRouter([2, 1, 0]),
        RandomRouter(seed=3),
        HeadRouter(3, 32, seed=4),
        HeadRouter(3, 32, width=0),
    ],
    ids=lambda router: type(router).__name__,
)
def test_saved_routers_decide_as_before(duo, windows, router, tmp_path):
    router.save_pretrained(tmp_path)
    loaded = routers.load(tmp_path)
    assert torch.equal(measure(duo, loaded, windows).routes, measure(duo, router, windows).routes)


def test_bad_router_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"router\.json is missing"):
        routers.load(tmp_path)
    (tmp_path / "router.json").write_text(json.dumps({"router": "os.system", "config": {}}))
    with pytest.raises(ValueError, match=r"unknown router 'os\.system'"):
        routers.load(tmp_path)
    HeadRouter(3, 32).save_pretrained(tmp_path)
    (tmp_path / "router.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks router\.safetensors"):
        routers.load(tmp_path)


def test_mixed_layers_equal_layer_by_layer():
    heads = LayerHeads(4, 16, 3, 8, torch.Generator().manual_seed(0))
    hidden, layer, compute = torch.randn(50, 16), torch.randint(4, (50,)), torch.rand(50)
    one_by_one = torch.cat([heads(hidden[[i]], int(layer[i]), compute[[i]]) for i in range(50)])
    assert torch.allclose(heads(hidden, layer, compute), one_by_one, atol=1e-6)


def test_supervised_learns_the_oracles_actions(duo, windows):
    """On the text it was taught on it agrees with the oracle far more often than an untrained router does."""
    env = Lockstep(duo, windows, reward=LossImprovement(0.0))
    learner = Supervised(env, windows=8, target="action", epochs=300, batch_size=168, learning_rate=0.01)
    oracle = measure(duo, OracleRouter(price=0.0), windows, context="reference").routes

    def agreement(router):
        return (measure(duo, router, windows, context="reference").routes == oracle).float().mean()

    taught = learner.learn(1)
    assert agreement(HeadRouter(3, 32)) < 0.7 < agreement(taught)


def test_soft_loss_is_the_papers():
    losses, compute = torch.tensor([[1.0, 3.0]]), torch.tensor([[0.2, 0.6]])
    assert soft_loss(losses, compute, budget=0.5, alpha=10.0, price=9.0) == pytest.approx(2.1)
    assert soft_loss(losses, compute, price=0.5) == pytest.approx(2.2)
    assert soft_loss(losses, compute, price=torch.tensor([[1.0, 2.0]])) == pytest.approx(2.7)
    assert [sharpness(x, 1.0, 16.0) for x in (0.0, 0.5, 1.0)] == [1, 4, 16]
    assert [sharpness(x, 1.0, 16.0, "linear") for x in (0.0, 0.5, 1.0)] == [1, 8.5, 16]
    assert [sharpness(x, 1.0, 16.0, "constant") for x in (0.0, 0.5, 1.0)] == [16, 16, 16]


def test_a_sharp_mixture_is_the_deployed_router(duo, windows):
    router = HeadRouter(3, 32, seed=1)
    losses, compute = soft_pass(duo, router, windows, tau=1e6)
    measured = measure(duo, router, windows)
    assert torch.allclose(losses, measured.loss, atol=1e-3)
    assert torch.allclose(compute, measured.compute, atol=1e-3)


def test_straight_through_runs_as_deployed_and_learns_as_the_mixture(duo, windows):
    router = HeadRouter(3, 32, seed=1, prices=(0.1, 1.0))
    price = torch.full((8, 1), 0.4)
    losses, compute = soft_pass(duo, router, windows, 1.0, price, straight_through=True)
    measured = measure(duo, router.at(price=0.4), windows)
    assert torch.allclose(losses, measured.loss, atol=1e-4) and torch.allclose(compute, measured.compute, atol=1e-4)
    losses.mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in router.parameters())
    shares, direction = torch.tensor([[0.2, 0.5, 0.3]], requires_grad=True), torch.tensor([[1.0, 2.0, 4.0]])
    hard = hardened(shares)
    (hard * direction).sum().backward()
    assert torch.allclose(hard, torch.tensor([[0.0, 1.0, 0.0]])) and torch.equal(shares.grad, direction)


def test_a_soft_router_for_a_range_spends_less_where_compute_is_dear(duo, windows):
    env = Lockstep(duo, windows, windows_per_batch=8, prices=(0.01, 20.0))
    router = Soft(env, updates=60, learning_rate=0.03).learn(1)
    spent = [measure(duo, router.at(price=price), windows).compute.mean() for price in (0.01, 20.0)]
    assert spent[1] < 0.3 < spent[0]
    with pytest.raises(ValueError, match="a budget or a range of prices"):
        Soft(env, budget=0.5)
    with pytest.raises(ValueError, match="unknown schedule 'cosine': choose from geometric"):
        Soft(env, schedule="cosine")


def test_the_soft_router_reaches_its_budget_and_obeys_a_price(duo, windows):
    def train(price=0.0, **options):
        env = Lockstep(duo, windows, windows_per_batch=8, reward=LossImprovement(price))
        return Soft(env, updates=150, learning_rate=0.03, **options).learn(1)

    for budget in (0.4, 0.8):
        router = train(budget=budget, alpha=30.0)
        assert measure(duo, router, windows).compute.mean() == pytest.approx(budget, abs=0.1)
    dear = train(price=50.0)
    assert (measure(duo, dear, windows).routes == 1).float().mean() > 0.95
