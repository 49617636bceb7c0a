"""What is taught by the oracle: values against naive enumeration, targets, and the routers that learn from them."""

import math
from functools import partial

import pytest
import torch

from duorl import devices, routers
from duorl.envs import Lockstep
from duorl.evaluation.compare import measure
from duorl.experiments.learners import named
from duorl.inputs import View
from duorl.learners import KNN, Ensemble, Soft, Supervised
from duorl.learners.ensemble import bootstrap
from duorl.learners.labels import Decisions, action_values, deviations, draw_routes, label, soft_maximum
from duorl.learners.supervised import Labels, target_loss, taught_loss
from duorl.oracle import exhaustive
from duorl.prices import ladder
from duorl.rewards import LogitLensShaping, LossImprovement, Reward, TeacherKL
from duorl.routed_pass import RoutedPass, remember
from duorl.routers import EnsembleRouter, HeadRouter, KNNRouter, OracleRouter
from duorl.routers.knn import unit

PRICE = 0.1


@pytest.fixture(scope="module")
def windows():
    """Six windows of nine tokens that begin with different ones, so that no state is stored twice."""
    drawn = torch.randint(61, (6, 10), generator=torch.Generator().manual_seed(3))
    drawn[:, 0] = torch.arange(6)
    return drawn


@pytest.fixture(scope="module")
def table(duo, windows):
    return exhaustive(duo, windows, actions=("skip", "small", "big"))


def task(duo, windows, price=PRICE, **options):
    return Lockstep(duo, windows, reward=LossImprovement(price), windows_per_batch=2, **options)


def naive_value(table, token, prefix, action, temperature):
    """Q(prefix, a) of one token, over the completions one by one."""
    start = torch.tensor([*prefix, action])
    completions = (table.routes[:, : len(start)] == start).all(1)
    values = -(table.losses[token] + PRICE * table.compute)[completions].double()
    if temperature == 0:
        return values.max().item()
    return temperature * (values / temperature).exp().mean().log().item()


@pytest.mark.parametrize("temperature", [0.0, 0.2, 5.0])
def test_action_values_are_those_of_all_completions(table, temperature):
    index = torch.randint(len(table.routes), table.losses.shape[:2], generator=torch.Generator().manual_seed(0))
    values = action_values(table, PRICE, index, temperature)
    assert values.shape == (6, 9, 3, 3)
    for token in ((0, 0), (3, 5), (5, 8)):
        route = table.routes[index[token]].tolist()
        for layer in range(3):
            naive = [naive_value(table, token, route[:layer], action, temperature) for action in range(3)]
            assert values[token][layer].tolist() == pytest.approx(naive, abs=1e-5)


@pytest.mark.parametrize("learner", [Supervised, Ensemble, partial(KNN, neighbours=1)])
def test_more_labels_than_fit_are_refused_before_they_are_made(duo, windows, learner, monkeypatch):
    env = task(duo, windows)
    monkeypatch.setattr(devices, "free_bytes", lambda device: 2 * 4 * 3 * 45 * 32)  # 3 layers, 45 tokens
    learner(env, windows=5)
    with pytest.raises(ValueError, match=r"the states of 54 routes do not fit into memory: .*; lower windows \(6\)"):
        learner(env, windows=6)


def test_the_soft_maximum_runs_from_the_maximum_to_the_mean():
    values = torch.tensor([[1.0, 2.0, 6.0]])
    assert soft_maximum(values, 0.0).item() == 6
    assert soft_maximum(values, 1e-4).item() == pytest.approx(6, abs=1e-3)
    assert soft_maximum(values, 1e7).item() == pytest.approx(3, abs=1e-5)
    assert soft_maximum(values, 1.0).item() == pytest.approx(math.log((math.e + math.e**2 + math.e**6) / 3), abs=1e-5)


def test_soft_labels_are_the_conditionals_of_the_distribution_over_routes(table):
    """Their product along a route is the route's own probability."""
    index = torch.randint(len(table.routes), table.losses.shape[:2], generator=torch.Generator().manual_seed(1))
    conditionals = (action_values(table, PRICE, index, 0.3) / 0.3).softmax(-1)
    taken = conditionals.gather(-1, table.routes[index][..., None]).squeeze(-1).prod(-1)
    joint = (-(table.losses + PRICE * table.compute) / 0.3).softmax(-1)
    assert torch.allclose(taken, joint.gather(-1, index[..., None]).squeeze(-1), atol=1e-6)


def test_routes_are_drawn_from_that_distribution(table):
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([draw_routes(table, PRICE, 0.3, generator) for _ in range(4000)])[:, 0, 0]
    shares = drawn.bincount(minlength=27) / len(drawn)
    joint = (-(table.losses[0, 0] + PRICE * table.compute) / 0.3).softmax(-1)
    assert torch.allclose(shares, joint, atol=0.03)
    assert torch.equal(draw_routes(table, PRICE, 0.0, generator), table.best(PRICE))


def test_labels_at_temperature_0_are_the_oracles_decisions(duo, windows):
    table = exhaustive(duo, windows)
    decisions = label(duo, windows, table, prices=(0.1, 0.5), temperature=0.0, generator=torch.Generator())
    routes = torch.cat([table.routes[table.best(price)].flatten(0, 1) for price in (0.1, 0.5)])  # (N, L)
    assert torch.equal(decisions.values.argmax(-1).T + 1, routes)
    spent = torch.stack([duo.action_compute[i][routes[:, i]] for i in range(3)]).cumsum(0)
    assert torch.allclose(decisions.compute[1:], spent[:-1]) and (decisions.compute[0] == 0).all()
    assert decisions.hidden.shape == (3, 108, 32)
    assert decisions.price.tolist() == pytest.approx([0.1] * 54 + [0.5] * 54)


def test_targets_ask_for_what_they_say():
    values, scores = torch.tensor([[[3.0, 1.0]]]), torch.tensor([[[0.5, 0.1]]])
    probability = scores.softmax(-1)[0, 0]
    losses = {
        "action": -probability[0].log(),
        "soft": -(probability.log() * torch.tensor([1.5, 0.5]).softmax(0)).sum(),
        "value": 2 * (0.2 - 1.0) ** 2,
        "cost": -(probability[0] - probability[1]),
    }
    for target, loss in losses.items():
        assert target_loss(scores, values, target=target, temperature=2.0) == pytest.approx(float(loss), abs=1e-6)


def test_the_ladder_of_prices():
    assert ladder((0.1, 1.6), 3) == pytest.approx([0.1, 0.4, 1.6])
    with pytest.raises(ValueError, match="0 < lowest < highest"):
        ladder((0.0, 1.0), 3)


def test_bad_options_are_refused(duo, windows):
    env = task(duo, windows)
    with pytest.raises(ValueError, match="unknown target 'label': choose from action"):
        Supervised(env, target="label")
    for learner in (Supervised, KNN, Ensemble):
        with pytest.raises(ValueError, match="temperature must be above 0"):
            learner(env, windows=6, neighbours=2, temperature=0.0) if learner is KNN else learner(env, temperature=0.0)
    with pytest.raises(ValueError, match="members"):
        Ensemble(env, members=0)


def test_deviations_are_what_whole_passes_say(duo, windows):
    """Every action in every layer, the rest of a random route as it is, by the table of all routes."""
    routes = torch.randint(3, (6, 9, 3), generator=torch.Generator().manual_seed(4))
    table = exhaustive(duo, windows, actions=("skip", "small", "big"))
    losses, compute = deviations(RoutedPass(duo, windows, context="reference"), routes, [0, 1, 2])
    assert losses.shape == compute.shape == (3, 6, 9, 3)
    for layer in range(3):
        for action in range(3):
            changed = routes.clone()
            changed[..., layer] = action
            index = table.index_of(changed)
            assert torch.allclose(losses[layer, ..., action], table.loss(index), atol=1e-5)
            assert torch.allclose(compute[layer, ..., action], table.compute[index], atol=1e-6)


def test_a_model_too_deep_to_search_is_labelled_by_deviations(duo, windows, monkeypatch):
    monkeypatch.setattr("duorl.learners.sources._MOST_SEARCHED", 1)
    monkeypatch.setattr("duorl.learners.sources.exhaustive", None)  # it is not asked for
    env = task(duo, windows, price=50.0)
    router = Supervised(env, windows=6, epochs=60, batch_size=81, learning_rate=0.03).learn(1)
    assert (measure(duo, router, windows, context="reference").routes == 1).float().mean() > 0.98
    priced = task(duo, windows, prices=(0.01, 20.0))
    for learner in (KNN(priced, windows=6, neighbours=5), Ensemble(priced, windows=6, members=2, epochs=30)):
        spent = [measure(duo, learner.learn(1).at(price=price), windows).compute.mean() for price in (0.01, 20.0)]
        assert spent[1] < spent[0]


def test_labels_along_a_base_policy_are_priced_anew_without_new_passes(duo, windows, tmp_path, monkeypatch):
    routers.PatternRouter([1, 2, 1]).save_pretrained(tmp_path)
    env, table = task(duo, windows, 0.1), exhaustive(duo, windows)
    labels = Labels(env, windows=6, temperature=1.0, rungs=1, base=str(tmp_path))
    for price in (0.1, 5.0):
        env.charge(price)
        decisions = labels.decisions()
        monkeypatch.setattr("duorl.learners.sources.deviated", None)  # it is not asked again
        assert labels.count == 54 and decisions.price.unique().item() == pytest.approx(price)
        for layer, action in ((0, 1), (0, 2), (1, 1), (2, 2)):
            changed = [1, 2, 1]
            changed[layer] = action
            index = table.index_of(torch.tensor(changed))
            values = -(table.losses[..., index] + price * table.compute[index]).flatten()
            assert torch.allclose(decisions.values[layer, :, action - 1], values, atol=1e-5)


def test_a_base_policy_is_a_constant_or_a_router_with_the_allowed_actions(duo, windows, tmp_path):
    HeadRouter(3, 32, prices=(0.1, 1.0), seed=3).save_pretrained(tmp_path / "router")
    priced = task(duo, windows, prices=(0.1, 1.0))
    for learner in (Supervised, KNN, Ensemble):
        options = {"neighbours": 2} if learner is KNN else {"epochs": 1}
        for base in ("small", str(tmp_path / "router")):
            router = learner(priced, windows=2, base=base, **options).learn(1)
            assert measure(duo, router.at(price=0.3), windows).loss.isfinite().all()
    routers.PatternRouter([0, 2, 1]).save_pretrained(tmp_path / "skips")
    with pytest.raises(ValueError, match="the base policy takes an action that is not among the allowed small, big"):
        Supervised(priced, base=str(tmp_path / "skips")).learn(1)
    with pytest.raises(
        ValueError, match="base must be one of random, small, big, or the folder of a router or of labels: no router"
    ):
        KNN(priced, base="nothing")


def test_a_learner_of_labels_sees_the_further_inputs(duo, windows):
    env = task(duo, windows, inputs=["update_norm"])
    found = Labels(env, windows=2, temperature=1.0, rungs=1).decisions()
    walk = RoutedPass(duo, windows[:2], context="reference", memory=remember(duo, windows[:2]))
    assert found.inputs.shape == (3, 18, 1) and (found.inputs[0] == 0).all() and (found.inputs[1:] > 0).all()
    assert torch.equal(found.hidden[0], walk.hidden.flatten(0, 1))
    router = Supervised(env, windows=2, epochs=1).learn(1)
    assert router.config["inputs"] == ["update_norm"] and measure(duo, router, windows).loss.isfinite().all()


@pytest.mark.parametrize("target", ["action", "soft", "value", "cost"])
def test_every_target_finds_a_known_optimum(target):
    """Big is worth more exactly where the state's first number is positive, at a low price only."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 600, 8, generator=generator)
    price = torch.tensor([0.1, 1.0]).repeat(300)
    worth = (hidden[..., 0] > 0).float() - price - 0.3
    values = torch.stack([torch.zeros_like(worth), worth], dim=-1)
    decisions = Decisions(hidden, torch.zeros(2, 600), None, price, values)
    router = HeadRouter(2, 8, width=32, prices=(0.1, 1.0))
    optimizer = torch.optim.Adam(router.parameters(), lr=0.01)

    def agreement():
        views = [View(hidden[layer], layer, decisions.compute[layer], price=price) for layer in range(2)]
        chosen = torch.stack([router.logits(view).argmax(-1) for view in views])
        return (chosen == values.argmax(-1)).float().mean()

    before = agreement()
    for _ in range(100):
        for index in torch.randperm(600, generator=generator).split(200):
            loss = taught_loss(router, decisions, index, target=target, temperature=1.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert before < 0.9 < 0.95 < agreement()


def test_a_huge_price_is_answered_with_all_small(duo, windows):
    learner = Supervised(task(duo, windows, 50.0), windows=6, epochs=60, batch_size=81, learning_rate=0.03)
    router = learner.learn(1)
    assert (measure(duo, router, windows, context="reference").routes == 1).float().mean() > 0.98


@pytest.mark.parametrize("target", ["action", "cost"])
def test_on_its_own_text_it_comes_near_the_oracle(duo, windows, target):
    """Few tokens can be memorized: most of the gap between an untrained router and the oracle closes."""
    options = {"target": target, "temperature": 0.05, "epochs": 200, "batch_size": 162, "learning_rate": 0.02}

    def loss(router):
        return measure(duo, router, windows, context="reference").loss.mean().item()

    taught = loss(Supervised(task(duo, windows, 1e-6), windows=6, width=64, **options).learn(1))
    oracle, untrained = loss(OracleRouter(price=1e-6)), loss(HeadRouter(3, 32))
    assert taught < untrained - 0.8 * (untrained - oracle)


def test_one_router_for_a_range_spends_less_where_compute_is_dear(duo, windows):
    env = task(duo, windows, prices=(0.01, 20.0))
    router = Supervised(env, windows=6, rungs=3, epochs=100, batch_size=240, learning_rate=0.03).learn(1)
    spent = [measure(duo, router.at(price=price), windows).compute.mean() for price in (0.01, 20.0)]
    assert spent[1] < 0.3 < spent[0]
    with pytest.raises(ValueError, match=r"use router\.at"):
        measure(duo, router, windows)


def test_one_neighbour_reproduces_the_oracle(duo, windows):
    router = KNN(task(duo, windows), windows=6, neighbours=1).learn(1)
    oracle = measure(duo, OracleRouter(price=PRICE), windows, context="reference").routes
    assert torch.equal(measure(duo, router, windows, context="reference").routes, oracle)


def test_one_neighbour_knows_every_stored_price(duo, windows):
    router = KNN(task(duo, windows, prices=(0.05, 5.0)), windows=6, neighbours=1, rungs=3).learn(1)
    for rung, price in enumerate((0.06, 0.4, 4.0)):
        for layer in range(3):
            chosen = router.at(price=price)(router.states[layer], layer, torch.zeros(54))
            assert torch.equal(chosen, router.codes[router.choices[rung, layer].long()])
    assert (router.choices[0] > router.choices[2]).float().mean() > 0.1
    with pytest.raises(ValueError, match=r"outside of 0\.05 to 5"):
        router.at(price=6.0)
    with pytest.raises(ValueError, match=r"use router\.at"):
        router(router.states[0], 0, torch.zeros(54))


def test_neighbours_vote_by_distance():
    router = KNNRouter(1, 4, 3, neighbours=2, temperature=0.5)
    router.states.copy_(unit(torch.tensor([[[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]])))
    router.choices[0, 0] = torch.tensor([1, 0, 0])
    query = torch.tensor([[[0.9, 0.4, 0.0, -0.1]]])
    near, far = (unit(query[0, 0]) - router.states[0, :2]).norm(dim=-1).tolist()
    weights = [math.exp(-near / 0.5), math.exp(-far / 0.5)]
    expected = [weights[1] / sum(weights), weights[0] / sum(weights)]
    assert router.votes(query, 0)[0, 0].tolist() == pytest.approx(expected, abs=1e-5)
    assert router(query, 0, torch.zeros(1, 1)).tolist() == [[2]]
    with pytest.raises(ValueError, match="neighbours 4 is more than the 3 states"):
        KNNRouter(1, 4, 3, neighbours=4)
    with pytest.raises(ValueError, match="trained for one price"):
        router.at(price=0.1)


def test_a_mean_of_members_decides_and_their_spread_is_known():
    router = EnsembleRouter(2, 8, ("skip", "small", "big"), members=3, seed=5, prices=(0.1, 1.0)).at(price=0.3)
    view = View(torch.randn(4, 6, 8), 1, torch.rand(4, 6))
    priced = View(view.hidden, 1, view.compute, price=torch.tensor(0.3))
    logits = torch.stack([member.logits(priced) for member in router.members])
    assert torch.allclose(router.every_logits(view), logits, atol=1e-6)
    assert torch.equal(router.decide(view), logits.mean(0).argmax(-1))
    margin = logits[..., 2] - logits[..., 1]
    deviation = ((margin - margin.mean(0)) ** 2).mean(0).sqrt()
    assert torch.allclose(router.spread(view), deviation, atol=1e-6) and (deviation > 0).all()
    with pytest.raises(ValueError, match="outside"):
        router.at(price=2.0)
    with pytest.raises(ValueError, match="small and big"):
        EnsembleRouter(2, 8, ("skip", "big")).spread(view)


def test_a_bootstrap_draws_whole_windows():
    drawn = bootstrap(2, 50, 3, torch.Generator().manual_seed(0)).view(2, 50, 3)
    assert torch.equal(drawn % 3, torch.arange(3).expand(2, 50, 3))
    assert torch.equal(drawn[1], drawn[0] + 150)
    assert 0.5 < len(drawn[0, :, 0].unique()) / 50 < 0.75  # 1 - 1/e


def test_the_ensembles_members_learn_and_differ(duo, windows):
    env = task(duo, windows, prices=(0.01, 20.0))
    learner = Ensemble(env, windows=6, members=3, rungs=2, epochs=60, batch_size=150, learning_rate=0.03)
    router = learner.learn(1)
    cheap, dear = (router.at(price=price) for price in (0.01, 20.0))
    assert measure(duo, dear, windows).compute.mean() < 0.3 < measure(duo, cheap, windows).compute.mean()
    first, second, _ = (member.heads.weights[0] for member in router.members)
    assert (first - second).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["ensemble", "knn"])
def test_saved_at_a_price_they_decide_as_before(duo, windows, kind, tmp_path):
    if kind == "knn":
        router = KNN(task(duo, windows, prices=(0.1, 1.0)), windows=6, neighbours=5, rungs=2).learn(1)
    else:
        router = EnsembleRouter(3, 32, members=3, prices=(0.1, 1.0))
    router.at(price=0.7).save_pretrained(tmp_path)
    loaded = routers.load(tmp_path)
    assert torch.equal(measure(duo, loaded, windows).routes, measure(duo, router.at(price=0.7), windows).routes)
    assert loaded.config["price"] == 0.7


def test_one_search_serves_all_prices(duo, windows, monkeypatch):
    searches = []
    found = exhaustive(duo, windows)
    monkeypatch.setattr("duorl.learners.sources.exhaustive", lambda *_, **__: searches.append(1) or found)
    labels = Labels(task(duo, windows, prices=(0.1, 1.0)), windows=6, temperature=1.0, rungs=4)
    assert labels.decisions().values.shape == (3, 4 * 54, 2) and labels.count == 4 * 54
    labels.decisions()
    assert len(searches) == 1


def test_labels_follow_the_price(duo, windows, monkeypatch):
    env = task(duo, windows, 0.1)
    labels = Labels(env, windows=6, temperature=0.0, rungs=1)
    before = labels.decisions()
    env.charge(5.0)
    monkeypatch.setattr("duorl.learners.sources.exhaustive", None)  # the search is not made again
    after = labels.decisions()
    assert after.price.unique().tolist() == [5.0] and labels.decisions() is after
    assert (after.values.argmax(-1) > before.values.argmax(-1)).sum() == 0
    assert (after.values.argmax(-1) < before.values.argmax(-1)).any()


@pytest.mark.parametrize("name", ["PPO", "A2C", "DQN", "MEX", "Soft", "Supervised", "KNN", "Ensemble"])
def test_a_hard_budget_that_a_learner_does_not_follow_is_refused(duo, windows, name):
    with pytest.raises(ValueError, match=f"{name} cannot keep big_layers 1: use MaskablePPO"):
        named(name)(Lockstep(duo, windows, windows_per_batch=2, big_layers=1))


class Thrift(Reward):
    def __call__(self, step):
        return -step.compute


@pytest.mark.parametrize("name", ["Soft", "Supervised", "KNN", "Ensemble"])
def test_a_reward_that_a_learner_does_not_follow_is_refused(duo, windows, name):
    few = {} if name == "Soft" else {"windows": 4}
    for reward in (Thrift(), LossImprovement(0.1) + Thrift(), TeacherKL(0.1)):
        with pytest.raises(ValueError, match=f"{name} learns from gain - price .* cannot follow the reward"):
            named(name)(Lockstep(duo, windows, windows_per_batch=2, reward=reward), **few)
    shaped = LossImprovement(0.1) + LogitLensShaping()  # the same returns
    near = {"neighbours": 3} if name == "KNN" else {}
    named(name)(Lockstep(duo, windows, windows_per_batch=2, reward=shaped), **few, **near)


def test_the_soft_router_follows_the_distance_if_that_is_its_target(duo, windows):
    env = Lockstep(duo, windows, windows_per_batch=2, reward=TeacherKL(0.1))
    Soft(env, target="teacher")
    with pytest.raises(ValueError, match="Soft learns from gain"):
        Soft(Lockstep(duo, windows, windows_per_batch=2, reward=TeacherKL(0.1, share=0.5)), target="teacher")


def test_a_learner_for_one_price_refuses_a_range_of_them(duo, windows):
    class OnePrice(Soft):
        honours = frozenset()

    with pytest.raises(ValueError, match="OnePrice cannot learn for a range of prices: give one price"):
        OnePrice(Lockstep(duo, windows, windows_per_batch=2, prices=(0.1, 1.0)))
