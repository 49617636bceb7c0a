"""Routers: what they decide, that they survive saving, and that the taught ones learn."""

import copy
import json
import pickle

import pytest
import torch
from conftest import make_duo
from safetensors.torch import load_file, save_file

from duorl import routers
from duorl.envs import Lockstep
from duorl.evaluation.compare import measure
from duorl.inputs import View
from duorl.learners import Soft, Supervised
from duorl.learners.sharpness import Sharpness
from duorl.learners.soft import distances, hardened, soft_loss, soft_pass
from duorl.oracle import exhaustive
from duorl.rewards import LossImprovement
from duorl.routers import (
    BudgetRouter,
    ConstantRouter,
    EnsembleRouter,
    HeadRouter,
    KNNRouter,
    MixedRouter,
    OracleRouter,
    PatternRouter,
    RandomRouter,
)
from duorl.routers.heads import LayerHeads


@pytest.fixture
def windows():
    return torch.randint(61, (8, 8), generator=torch.Generator().manual_seed(2))


def test_a_used_router_reaches_other_processes(duo, windows):
    router = HeadRouter(3, 32, seed=1)
    routes = measure(duo, router, windows).routes
    assert torch.equal(measure(duo, pickle.loads(pickle.dumps(router)), windows).routes, routes)


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
    assert [Sharpness(1.0, 16.0).at(x) for x in (0.0, 0.5, 1.0)] == [1, 4, 16]
    assert [Sharpness(1.0, 16.0, "linear").at(x) for x in (0.0, 0.5, 1.0)] == [1, 8.5, 16]
    assert [Sharpness(1.0, 16.0, "constant").at(x) for x in (0.0, 0.5, 1.0)] == [16, 16, 16]


def test_a_sharp_mixture_is_the_deployed_router(duo, windows):
    router = HeadRouter(3, 32, seed=1)
    walk = soft_pass(duo, router, windows, tau=1e6)
    measured = measure(duo, router, windows)
    assert torch.allclose(walk.losses(), measured.loss, atol=1e-3)
    assert torch.allclose(walk.compute, measured.compute, atol=1e-3)


def test_the_distance_of_a_mixture_to_all_big_is_the_divergence(duo, windows):
    walk = soft_pass(duo, HeadRouter(3, 32, seed=1), windows, tau=1.0)
    own, teacher = walk.logits().log_softmax(-1), duo(input_ids=windows[:, :-1]).logits.log_softmax(-1)
    naive = (teacher.exp() * (teacher - own)).sum(-1)
    assert torch.allclose(distances(walk, duo, windows), naive, atol=1e-5)
    assert naive.min() > 1e-6


def test_a_soft_router_can_learn_from_the_teacher(duo, windows):
    env = Lockstep(duo, windows, reward=LossImprovement(0.0), windows_per_batch=8)

    def distance(updates):
        router = Soft(env, updates=updates, target="teacher").learn(1)
        return distances(soft_pass(duo, router, windows, tau=20.0), duo, windows).mean()

    assert distance(60) < 0.7 * distance(1)


def test_straight_through_runs_as_deployed_and_learns_as_the_mixture(duo, windows):
    router = HeadRouter(3, 32, seed=1, prices=(0.1, 1.0))
    price = torch.full((8, 1), 0.4)
    walk = soft_pass(duo, router, windows, 1.0, price, straight_through=True)
    losses, compute, measured = walk.losses(), walk.compute, measure(duo, router.at(price=0.4), windows)
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


# Which model a router is for


def trained(model, windows):
    """A router after a short training."""
    return Soft(Lockstep(model, windows, windows_per_batch=2), updates=1).learn(1)


@pytest.mark.parametrize("wrap", [lambda router: router, lambda router: BudgetRouter(router, 1)])
def test_a_router_knows_the_model_that_it_was_trained_for(duo, windows, wrap, tmp_path):
    router = wrap(trained(duo, windows))
    loaded = routers.load(save(router, tmp_path))
    assert loaded.trained_for == router.trained_for and loaded.trained_for["layers"] == 3
    measure(duo, loaded, windows)
    loaded.require_fit(copy.deepcopy(duo).to(torch.float16))  # the same model, in another precision
    other = copy.deepcopy(duo)
    for parameter in other.stack.ffns[1].small.parameters():
        parameter.data *= 1.1
    for use in (
        lambda: measure(other, loaded, windows),
        lambda: other(input_ids=windows, router=routers.load(tmp_path / "saved")),
        lambda: loaded.require_fit(make_duo("gpt2")),
        lambda: Soft(Lockstep(other, windows), init=str(save(trained(duo, windows), tmp_path))),
    ):
        with pytest.raises(ValueError, match=r"trained for the model .*llama, 3 layers of width 32"):
            use()


def save(router, folder):
    router.save_pretrained(folder / "saved")
    return folder / "saved"


@pytest.mark.parametrize(
    ("router", "message"),
    [
        (HeadRouter(2, 32), "a model of layers 2, this one has 3"),
        (HeadRouter(4, 32), "a model of layers 4, this one has 3"),
        (HeadRouter(3, 16), "a model of hidden size 16, this one has 32"),
        (KNNRouter(4, 32, 64), "layers 4"),
        (EnsembleRouter(4, 32), "layers 4"),
        (BudgetRouter(HeadRouter(4, 32), 1), "layers 4"),
        (PatternRouter([1, 2]), "layers 2"),
        (PatternRouter([1, 2, 1, 2]), "layers 4"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_router_of_other_sizes_is_refused(duo, windows, router, message):
    with pytest.raises(ValueError, match=message):
        measure(duo, router, windows)
    with pytest.raises(ValueError, match=message):
        duo(input_ids=windows, router=router)


def spoil_json(**changes):
    def spoil(folder):
        path = folder / "router.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return spoil


def spoil_weights(change):
    def spoil(folder):
        path = folder / "router.safetensors"
        state = load_file(path)
        change(state)
        save_file(state, path)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "router.json").write_text("{"), "not JSON"),
        (lambda folder: (folder / "router.json").write_text("[1]"), "no JSON object"),
        (lambda folder: (folder / "router.json").write_bytes(b"\xff\xfe"), "not JSON"),
        (lambda folder: (folder / "router.safetensors").write_bytes(b"12345678"), "router.safetensors is broken"),
        (lambda folder: (folder / "router.safetensors").write_bytes(b""), "router.safetensors is broken"),
        (spoil_json(config={"layers": 10**12, "hidden_size": 32}), "layers is 1000000000000, more than"),
        (spoil_json(config={"layers": 40, "hidden_size": 40}), r"weights.0 is float32 \(3, 33, 2\).*\(40, 41, 2\)"),
        (spoil_json(config={"layers": "three", "hidden_size": 32}), "HeadRouter refuses its configuration: TypeError"),
        (spoil_json(config={"size": 3}), "HeadRouter refuses its configuration"),
        (spoil_json(config=None), "an object `config`"),
        (spoil_json(router="base"), "unknown router 'base'"),
        (spoil_json(model={"weights": ["x"]}), "record `model` .* is broken"),
        (spoil_weights(lambda state: state["heads.biases.0"].fill_(torch.nan)), "biases.0 holds numbers that are not"),
        (spoil_weights(lambda state: state.pop("heads.biases.0")), "lacks heads.biases.0"),
        (spoil_weights(lambda state: state.update(more=torch.zeros(1))), "more is not among the weights"),
    ],
)
def test_a_broken_router_is_refused_by_file_and_cause(spoil, message, tmp_path):
    folder = save(HeadRouter(3, 32), tmp_path)
    spoil(folder)
    with pytest.raises(ValueError, match=message) as refused:
        routers.load(folder)
    assert str(folder) in str(refused.value)


def test_simple_routers_refuse_what_is_no_action_or_price():
    for wrong in ([], [1, 3], [-1]):
        with pytest.raises(ValueError, match="codes 0 to 2"):
            PatternRouter(wrong)
    with pytest.raises(ValueError, match="price must be at least 0"):
        OracleRouter(float("nan"))


def test_a_stored_choice_that_is_no_action_is_refused(tmp_path):
    folder = save(KNNRouter(3, 32, 64), tmp_path)
    spoil_weights(lambda state: state["choices"][0, 1, :1].fill_(2))(folder)
    with pytest.raises(ValueError, match="choices are 0 to 1, not 2"):
        routers.load(folder)


def test_a_mixture_draws_for_each_text_and_spends_its_shares(duo, tmp_path):
    texts = torch.randint(1, 61, (400, 6), generator=torch.Generator().manual_seed(7))
    mixture = MixedRouter([PatternRouter([1, 1, 1]), PatternRouter([2, 1, 2])], [0.25, 0.75], seed=3)
    routes = measure(duo, mixture, texts).routes
    assert all(len(set(map(tuple, window))) == 1 for window in routes.tolist())  # one pattern for all of a text
    big = (routes[:, 0, 0] == 2).float()
    assert big.mean().item() == pytest.approx(0.75, abs=4 * (0.25 * 0.75 / 400) ** 0.5)
    assert torch.equal(measure(duo, mixture, texts.flip(0), batch=7).routes, routes.flip(0))  # in any batch
    other = texts.clone()
    other[:, -1] = other[:, -1] % 60 + 1  # the last token is a target, and no die
    assert torch.equal(measure(duo, mixture, other).routes, routes)
    filled = torch.cat([texts.new_zeros(400, 2), texts, texts.new_zeros(400, 3)], dim=1)
    mixture.begin(duo, filled)
    view = View(torch.zeros(400, 1, 32), 0, torch.zeros(400, 1))
    drawn = mixture.decide(view)
    mixture.begin(duo, texts)
    assert torch.equal(mixture.decide(view), drawn)  # what fills up a batch is no part of the text
    mixture.save_pretrained(tmp_path)
    assert torch.equal(measure(duo, routers.load(tmp_path), texts).routes, routes)
    assert not torch.equal(measure(duo, MixedRouter(mixture.parts, [0.25, 0.75], seed=4), texts).routes, routes)


def test_a_mixture_generates_with_one_router_per_prompt(duo):
    prompts = torch.randint(61, (24, 6), generator=torch.Generator().manual_seed(7))
    mixture = MixedRouter([PatternRouter([1, 1, 1]), PatternRouter([2, 1, 2])], [0.5, 0.5])
    more = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    found = duo.generate(prompts, router=mixture, **more).routes
    assert all(len(set(map(tuple, text))) == 1 for text in found.tolist())
    assert 0 < (found[:, 0, 0] == 2).sum() < 24
    with pytest.raises(ValueError, match=r"call router\.begin"):
        MixedRouter([PatternRouter([1, 1, 1])], [1.0])(torch.zeros(2, 3, 32), 0, torch.zeros(2, 3))


def test_a_mixture_of_learned_routers_keeps_their_weights_prices_and_flops(duo, tmp_path):
    parts = [HeadRouter(3, 32, seed=1, prices=(0.1, 1.0)), HeadRouter(3, 32, width=4, seed=2)]
    mixture = MixedRouter(parts, [0.5, 0.5]).at(price=0.3)
    assert not mixture.takes_price and mixture.parts[0].config["price"] == 0.3
    mixture.save_pretrained(tmp_path)
    again, texts = routers.load(tmp_path), torch.randint(61, (8, 6))
    assert torch.equal(measure(duo, again, texts).routes, measure(duo, mixture, texts).routes)
    heads = [2 * 3 * (32 + 1 + 2) * 2, 2 * 3 * ((32 + 1) * 4 + 4 * 2)]
    assert [part.flops() for part in parts] == heads and mixture.flops() == sum(heads) / 2
    for shares in ([1.0], [0.5, 0.6], [1.5, -0.5]):
        with pytest.raises(ValueError, match="2 routers need as many shares"):
            MixedRouter(parts, shares)
    with pytest.raises(ValueError, match="models of different sizes"):
        MixedRouter([PatternRouter([1, 1]), PatternRouter([1])], [0.5, 0.5])


def test_a_routers_own_flops_are_those_of_its_matrices(duo):
    assert ConstantRouter("big").flops() == PatternRouter([1, 1, 1]).flops() == 0
    neighbours = KNNRouter(3, 32, size=100)
    assert neighbours.flops() == 2 * 3 * 100 * 32
    assert EnsembleRouter(3, 32, members=4).flops() == 4 * HeadRouter(3, 32).flops()
    assert BudgetRouter(HeadRouter(3, 32), 1).flops() == HeadRouter(3, 32).flops()
