"""Agents: their mathematics against closed forms, and that they learn."""

import pytest
import torch
from conftest import make_duo

import agents
from agents.advantages import entropy, explained_variance, leave_one_out, rewards_to_go
from duorl.rewards import LossImprovement, Reward
from duorl.routers import HeadRouter
from envs import Lockstep, RoutingVecEnv


@pytest.fixture
def windows():
    return torch.randint(61, (8, 8), generator=torch.Generator().manual_seed(2))


class PrefersBigInLayerOne(Reward):
    """A known optimum: big in layer 1 earns 1, big elsewhere costs 1."""

    def __call__(self, step):
        big = (step.action == 2).float()
        return big if step.layer == 1 else -big


def test_rewards_to_go_are_the_sums_of_what_follows():
    rewards = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert rewards_to_go(rewards).tolist() == [[9, 12], [8, 10], [5, 6]]


def test_leave_one_out_is_the_mean_of_the_others():
    values = torch.tensor([[1.0, 10.0, 3.0, 20.0, 8.0, 60.0]])  # K = 3 copies of 2 tokens
    assert leave_one_out(values, 3).tolist() == [[5.5, 40.0, 4.5, 35.0, 2.0, 15.0]]
    with pytest.raises(ValueError, match="group_size of at least 2"):
        leave_one_out(values, 1)


def test_explained_variance_and_entropy_at_their_limits():
    x = torch.randn(100)
    assert explained_variance(x, x) == 1
    assert explained_variance(torch.zeros(100), x) == pytest.approx(0, abs=1e-6)
    assert torch.isnan(torch.tensor(explained_variance(x, torch.ones(100))))
    assert torch.allclose(entropy(torch.zeros(3)), torch.tensor(3.0).log())
    assert entropy(torch.tensor([0.0, -100.0])) < 1e-6


@pytest.mark.parametrize("baseline", ["none", "mean", "leave-one-out", "value"])
def test_reinforce_solves_a_known_optimum(duo, windows, baseline):
    env = Lockstep(duo, windows, windows_per_batch=2, group_size=4, reward=PrefersBigInLayerOne())
    agent = agents.REINFORCE(env, baseline=baseline, learning_rate=0.03)
    returns = []
    router = agent.learn(
        200 * agent.decisions_per_update, lambda _, metrics, __: returns.append(metrics["rollout/return"])
    )
    assert returns[0] < 0 < 0.9 < returns[-1]
    assert _routes(duo, router, windows) == [1, 2, 1]


@pytest.mark.parametrize("group_size", [1, 4])
def test_ppo_solves_a_known_optimum(duo, windows, group_size):
    env = Lockstep(duo, windows, windows_per_batch=8, group_size=group_size, reward=PrefersBigInLayerOne())
    agent = agents.PPO(env, learning_rate=0.03, epochs=4)
    returns = []
    router = agent.learn(
        60 * agent.decisions_per_update, lambda _, metrics, __: returns.append(metrics["rollout/return"])
    )
    assert returns[0] < 0 < 0.9 < returns[-1]
    assert _routes(duo, router, windows) == [1, 2, 1]


def _routes(model, router: HeadRouter, windows) -> list[int]:
    """The one route that the router takes for all tokens."""
    from duorl.evaluate import measure

    routes = measure(model, router, windows).routes.flatten(0, 1)
    assert (routes == routes[0]).all()
    return routes[0].tolist()


def test_reinforce_gradient_equals_the_enumerated_policy_gradient():
    """One token, all routes enumerated: the mean of the sampled gradients approaches grad sum_r pi(r) G(r)."""
    duo = make_duo("llama")
    windows = torch.randint(61, (1, 2), generator=torch.Generator().manual_seed(5))  # T = 1
    env = Lockstep(duo, windows, windows_per_batch=1, group_size=2000, reward=LossImprovement(0.1))
    agent = agents.REINFORCE(env, baseline="leave-one-out", width=0)
    _logits, log_chosen, _ = agent._episode()
    returns = rewards_to_go(env.outcome.rewards)
    parameter = agent.router.heads.biases[0]
    surrogate = (log_chosen * (returns - leave_one_out(returns, 2000))).sum(0).mean()
    (sampled,) = torch.autograd.grad(surrogate, parameter)
    exact = torch.autograd.grad(_expected_return(agent.router, env, windows), parameter)[0]
    scale = exact.abs().max()
    assert scale > 1e-3
    assert (sampled - exact).abs().max() < 0.25 * scale


def _expected_return(router, env, windows):
    """sum_r pi(r) G(r) over all 8 routes, by one episode of 8 copies that take one each."""
    from envs import RoutingDynamics

    dynamics = RoutingDynamics(env.model, reward=env.reward, group_size=8)
    dynamics.reset(windows)
    choices = torch.cartesian_prod(*[torch.arange(2)] * 3)
    log_shares = torch.zeros(8)
    while not dynamics.done:
        scores = router.logits(dynamics.hidden, dynamics.layer, dynamics.compute)
        choice = choices[:, dynamics.layer]
        log_shares = log_shares + torch.log_softmax(scores, -1).gather(1, choice[:, None]).squeeze(1)
        dynamics.step(choice)
    return (log_shares.exp() * dynamics.outcome.rewards.sum(0)).sum()


@pytest.mark.parametrize("agent", ["PPO", "REINFORCE"])
def test_one_seed_one_result(duo, windows, agent):
    def train(seed):
        env = Lockstep(duo, windows, windows_per_batch=2, group_size=2, seed=seed)
        learner = getattr(agents, agent)(env)
        seen = []
        router = learner.learn(3 * learner.decisions_per_update, lambda n, metrics, _: seen.append((n, metrics)))
        return seen, torch.cat([p.flatten() for p in router.parameters()])

    (first, weights), (again, same_weights), (_, other_weights) = train(0), train(0), train(1)
    assert torch.equal(weights, same_weights) and not torch.equal(weights, other_weights)
    assert str(first) == str(again)


def test_both_agents_report_the_same_tags(duo, windows):
    tags = []
    for agent in (agents.PPO, agents.REINFORCE):
        learner = agent(Lockstep(duo, windows, windows_per_batch=2, group_size=2))
        learner.learn(1, lambda _, metrics, __: tags.append(set(metrics)))
    assert tags[0] == tags[1]
    assert {"rollout/return", "train/entropy", "train/explained_variance", "actions_big/layer_2"} <= tags[0]


def test_ppos_learning_rate_falls_to_its_last_share_and_never_below(duo, windows):
    """Also where the decisions asked for are no multiple of an update's."""
    agent = agents.PPO(Lockstep(duo, windows, windows_per_batch=2), learning_rate=0.1)
    rates = []

    def note(*_):
        rates.append(agent.algorithm.policy.optimizer.param_groups[0]["lr"])

    agent.learn(int(3.4 * agent.decisions_per_update), note)
    note()
    assert rates[1:] == pytest.approx([0.1, 0.075, 0.05, 0.025])  # told before its update; the last one after


def test_ppos_group_advantages_are_leave_one_out(duo, windows):
    env = Lockstep(duo, windows, windows_per_batch=2, group_size=2)
    agent = agents.PPO(env)
    agent.learn(1)
    buffer = agent.algorithm.rollout_buffer
    returns = rewards_to_go(torch.from_numpy(buffer.rewards))
    advantages = torch.from_numpy(buffer.advantages).view(-1, 3).T  # SB3 flattened them, tokens first
    assert torch.allclose(advantages, returns - leave_one_out(returns, 2))


def test_leave_one_out_without_copies_is_refused(duo, windows):
    with pytest.raises(ValueError, match="group_size to at least 2"):
        agents.REINFORCE(Lockstep(duo, windows, windows_per_batch=2))


def test_the_vector_environment_is_the_one_sb3_sees(duo, windows):
    agent = agents.PPO(Lockstep(duo, windows, windows_per_batch=2))
    assert isinstance(agent.vec_env, RoutingVecEnv) and agent.algorithm.n_steps == 3
