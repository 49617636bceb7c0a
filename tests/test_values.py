"""Learners of values and flows: their mathematics against closed forms, and that they learn."""

import math

import numpy as np
import pytest
import torch
from test_agents import PrefersBigInLayerOne, _routes

from duorl import agents
from duorl.agents.dqn import epsilon_greedy_entropy, mex_loss
from duorl.agents.gflownet import subtrajectory_balance
from duorl.envs import Lockstep, RoutingDynamics
from duorl.evaluation.compare import measure
from duorl.rewards import LossImprovement

QUICK = {"learning_rate": 0.03, "gradient_steps": 4, "batch_size": 256}
LEARNERS = {"GFlowNet": {"learning_rate": 0.03}, "DQN": QUICK, "MEX": QUICK}


@pytest.fixture
def windows():
    return torch.randint(61, (8, 8), generator=torch.Generator().manual_seed(2))


def _random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("decay", [0.5, 1.0, 2.0])
def test_subtrajectory_balance_is_the_weighted_mean_over_all_pairs(decay):
    log_flow, log_chosen = _random(5, 3), _random(4, 3, seed=1)
    total, weights = 0.0, 0.0
    for i in range(5):
        for j in range(i + 1, 5):
            gap = log_flow[i] + log_chosen[i:j].sum(0) - log_flow[j]
            total += decay ** (j - i) * gap.square().mean().item()
            weights += decay ** (j - i)
    assert subtrajectory_balance(log_flow, log_chosen, decay).item() == pytest.approx(total / weights, rel=1e-5)


def test_subtrajectory_balance_is_zero_at_the_closed_form_alone():
    """3 binary decisions: F(s) sums exp(return) over the routes through s, pi(a | s) = F(s a) / F(s)."""
    scores = _random(2, 2, 2)
    flows = [scores.logsumexp((0, 1, 2)), scores.logsumexp((1, 2)), scores.logsumexp(2), scores]
    routes = torch.cartesian_prod(*[torch.arange(2)] * 3)
    log_flow = torch.stack(
        [flow[tuple(routes[:, :depth].T)] if depth else flow.expand(8) for depth, flow in enumerate(flows)]
    )
    log_chosen = log_flow.diff(dim=0)
    assert subtrajectory_balance(log_flow, log_chosen, 0.9) < 1e-10
    assert subtrajectory_balance(log_flow + 0.1, log_chosen, 0.9) < 1e-10  # a constant cancels ...
    log_flow[0] += 0.1  # ... unless one end alone has it
    assert subtrajectory_balance(log_flow, log_chosen, 0.9) > 1e-4


def test_gflownet_samples_the_softmax_of_the_returns(duo):
    """One token, all routes enumerated: P(route) = exp(return / temperature) / sum."""
    windows = torch.randint(61, (1, 2), generator=torch.Generator().manual_seed(5))  # T = 1
    env = Lockstep(duo, windows, windows_per_batch=1, group_size=64, reward=LossImprovement(0.1))
    agent = agents.GFlowNet(env, temperature=0.1)
    router = agent.learn(200 * agent.decisions_per_update)
    shares, returns = _enumerated(router, env)
    target = torch.softmax(returns / 0.1, 0)
    assert 0.5 * (target - 1 / 8).abs().sum() > 0.2  # the uniform start is far from it
    assert 0.5 * (shares - target).abs().sum() < 0.02


def _enumerated(router, env):
    """Probability and return of each of the 8 routes of a window's only token, by 8 copies that take one each."""
    dynamics = RoutingDynamics(env.model, reward=env.reward, group_size=8)
    dynamics.reset(env.windows)
    routes = torch.cartesian_prod(*[torch.arange(2)] * 3)
    log_shares = torch.zeros(8)
    while not dynamics.done:
        scores = router.logits(dynamics.view)
        choice = routes[:, dynamics.layer]
        log_shares += torch.log_softmax(scores, -1).gather(1, choice[:, None]).squeeze(1)
        dynamics.step(choice)
    return log_shares.exp(), dynamics.outcome.rewards.sum(0)


def test_gflownet_keeps_a_hard_budget(duo, windows):
    env = Lockstep(duo, windows, windows_per_batch=2, big_layers=1, reward=PrefersBigInLayerOne())
    agent = agents.GFlowNet(env, learning_rate=0.03)
    seen = []
    agent.learn(60 * agent.decisions_per_update, lambda _, metrics, __: seen.append(metrics))
    assert (env.outcome.routes == 2).sum(1).eq(1).all()
    assert all(math.isfinite(value) for value in seen[-1].values())
    assert seen[-1]["rollout/return"] > 0.9


@pytest.mark.parametrize("option", ["temperature", "decay"])
def test_gflownet_refuses_what_has_no_meaning(duo, windows, option):
    with pytest.raises(ValueError, match=f"{option}.* must be above 0"):
        agents.GFlowNet(Lockstep(duo, windows, windows_per_batch=2), **{option: 0.0})


def test_epsilon_greedy_entropy_at_its_limits_and_sampled():
    assert epsilon_greedy_entropy(0.0, 3) == 0
    assert epsilon_greedy_entropy(1.0, 3) == pytest.approx(math.log(3))
    assert epsilon_greedy_entropy(0.5, 2) == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))


def test_mex_loss_is_the_squared_error_less_the_lead_of_the_best():
    q, chosen = torch.tensor([[0.0, math.log(3.0)], [1.0, 1.0]]), torch.tensor([0, 1])
    target = torch.tensor([2.0, 1.5])
    assert mex_loss(q, chosen, target, 0.0).item() == pytest.approx((4 + 0.25) / 2)
    # max - logsumexp: log 3 - log 4 and -log 2
    lead = (math.log(3 / 4) - math.log(2)) / 2
    assert mex_loss(q, chosen, target, 0.1).item() == pytest.approx((4 + 0.25) / 2 - 0.1 * lead)


def test_mex_without_optimism_learns_dqns_values(duo, windows):
    """Also where errors are far above 1: DQN's values are means, and not what a Huber loss makes of them."""

    def train(learner, **options):
        env = Lockstep(duo, windows, windows_per_batch=2, reward=lambda step: 100 * step.gain)
        agent = learner(env, gradient_steps=4, batch_size=256, **options)
        return torch.cat([p.flatten() for p in agent.learn(4 * agent.decisions_per_update).parameters()])

    dqn, mex, optimist = train(agents.DQN), train(agents.MEX, eta=0.0), train(agents.MEX, eta=1.0)
    assert torch.allclose(dqn, mex, atol=1e-4)
    assert not torch.allclose(dqn, optimist, atol=1e-3)


def test_dqn_explores_token_by_token(duo, windows):
    """The share of greedy choices within one layer is that of epsilon, not all or none."""
    agent = agents.DQN(Lockstep(duo, windows, windows_per_batch=8, group_size=4), exploration_final=0.5, **QUICK)
    agent.learn(8 * agent.decisions_per_update)
    algorithm = agent.algorithm
    assert algorithm.epsilon == 0.5
    greedy = algorithm.q_net({k: torch.as_tensor(v) for k, v in algorithm._last_obs.items()}).argmax(1).numpy()
    shares = [(algorithm._sample_action(0, n_envs=len(greedy))[0] == greedy).mean() for _ in range(20)]
    assert np.mean(shares) == pytest.approx(0.75, abs=0.05) and np.std(shares) < 0.1


def test_dqn_does_not_bootstrap_beyond_the_last_layer(duo, windows):
    """Q of the last layer is the last reward, whatever the next episode's first state promises."""
    env = Lockstep(duo, windows, windows_per_batch=8, reward=PrefersBigInLayerOne())
    agent = agents.DQN(env, **QUICK)
    q = agent.learn(60 * agent.decisions_per_update)
    env.draw()
    expected = [[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]  # small and big, with the best continuation
    for layer in range(3):
        values = q.logits(env.view).detach().mean(0)
        assert values.tolist() == pytest.approx(expected[layer], abs=0.1)
        env.step(torch.full((env.num_tokens,), int(layer == 1)))


def test_dqns_buffer_holds_whole_episodes(duo, windows):
    env = Lockstep(duo, windows, windows_per_batch=2)  # 3 layers of 14 tokens
    for size, steps in ((1, 3), (42 * 2 + 41, 6)):
        assert agents.DQN(env, buffer_size=size).algorithm.replay_buffer.buffer_size == steps


@pytest.mark.parametrize("name", LEARNERS)
def test_it_solves_a_known_optimum(duo, windows, name):
    env = Lockstep(duo, windows, windows_per_batch=8, group_size=2, reward=PrefersBigInLayerOne())
    agent = getattr(agents, name)(env, **LEARNERS[name])
    returns = []
    router = agent.learn(
        60 * agent.decisions_per_update, lambda _, metrics, __: returns.append(metrics["rollout/return"])
    )
    assert returns[0] < 0 < 0.9 < returns[-1]
    assert _routes(duo, router, windows) == [1, 2, 1]


@pytest.mark.parametrize("name", LEARNERS)
def test_one_seed_one_result(duo, windows, name):
    def train(seed):
        env = Lockstep(duo, windows, windows_per_batch=2, group_size=2, seed=seed)
        learner = getattr(agents, name)(env)
        seen = []
        router = learner.learn(3 * learner.decisions_per_update, lambda n, metrics, _: seen.append((n, metrics)))
        return seen, torch.cat([p.flatten() for p in router.parameters()])

    (first, weights), (again, same_weights), (_, other_weights) = train(0), train(0), train(1)
    assert torch.equal(weights, same_weights) and not torch.equal(weights, other_weights)
    assert str(first) == str(again)


@pytest.mark.parametrize("name", LEARNERS)
def test_it_reports_what_reinforce_reports(duo, windows, name):
    reported = []
    for learner in (agents.REINFORCE, getattr(agents, name)):
        agent = learner(Lockstep(duo, windows, windows_per_batch=2, group_size=2))
        agent.learn(1, lambda decisions, metrics, _: reported.append((decisions, list(metrics))))
    assert reported[0] == reported[1]


@pytest.mark.parametrize("name", LEARNERS)
def test_one_router_for_all_prices(duo, windows, name):
    """It takes the price as an input, and answers a high one with less compute."""
    env = Lockstep(duo, windows, windows_per_batch=8, group_size=4, prices=(0.02, 0.8))
    agent = getattr(agents, name)(env, **LEARNERS[name])
    router = agent.learn(50 * agent.decisions_per_update)
    low, high = (measure(duo, router.at(price=price), windows).compute.mean() for price in (0.02, 0.8))
    assert high < low
