"""Agents: their mathematics against closed forms, and that they learn."""

from itertools import product

import pytest
import torch
from conftest import make_duo
from torch.nn.functional import one_hot

from duorl import agents
from duorl.agents.advantages import entropy, explained_variance, leave_one_out, rewards_to_go
from duorl.agents.reinmax import action_effects, discounted_slopes
from duorl.agents.rollouts import sample
from duorl.envs import Lockstep, RoutingDynamics, RoutingVecEnv
from duorl.envs.credit import Credit
from duorl.evaluation.compare import measure
from duorl.inputs import View
from duorl.learners.target import TargetCompute
from duorl.rewards import LossImprovement, Reward
from duorl.routers import HeadRouter, PatternRouter, price_for


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
    routes = measure(model, router, windows).routes.flatten(0, 1)
    assert (routes == routes[0]).all()
    return routes[0].tolist()


def test_reinforce_gradient_equals_the_enumerated_policy_gradient():
    """One token, all routes enumerated: the mean of the sampled gradients approaches grad sum_r pi(r) G(r)."""
    duo = make_duo("llama")
    windows = torch.randint(61, (1, 2), generator=torch.Generator().manual_seed(5))  # T = 1
    env = Lockstep(duo, windows, windows_per_batch=1, group_size=2000, reward=LossImprovement(0.1))
    agent = agents.REINFORCE(env, baseline="leave-one-out", width=0)
    episode = sample(env, agent.router, agent.generator)
    returns = rewards_to_go(episode.outcome.rewards)
    parameter = agent.router.heads.biases[0]
    surrogate = (episode.log_chosen * (returns - leave_one_out(returns, 2000))).sum(0).mean()
    (sampled,) = torch.autograd.grad(surrogate, parameter)
    exact = torch.autograd.grad(_expected_return(agent.router, env, windows), parameter)[0]
    scale = exact.abs().max()
    assert scale > 1e-3
    assert (sampled - exact).abs().max() < 0.25 * scale


def _expected_return(router, env, windows):
    """sum_r pi(r) G(r) over all 8 routes, by one episode of 8 copies that take one each."""
    dynamics = RoutingDynamics(env.model, reward=env.reward, group_size=8)
    dynamics.reset(windows)
    choices = torch.cartesian_prod(*[torch.arange(2)] * 3)
    log_shares = torch.zeros(8)
    while not dynamics.done:
        scores = router.logits(dynamics.view)
        choice = choices[:, dynamics.layer]
        log_shares = log_shares + torch.log_softmax(scores, -1).gather(1, choice[:, None]).squeeze(1)
        dynamics.step(choice)
    return (log_shares.exp() * dynamics.outcome.rewards.sum(0)).sum()


def test_a_state_that_is_told_three_times_is_learned_as_fast(duo, windows):
    """Width alone changes no policy: heads on 384 numbers, and on the same ones three times over, learn alike."""
    generator = torch.Generator().manual_seed(0)
    states, rewards = torch.randn(64, 384, generator=generator), torch.randn(64, 2, generator=generator)
    entropies = []
    for width, head_width in product((1, 3), (0, 16)):
        router = HeadRouter(1, 384 * width, width=head_width)
        optimizer = torch.optim.Adam(router.parameters(), lr=1e-2)
        for _ in range(12):
            logits = router.logits(View(states.repeat(1, width), 0, torch.zeros(64)))
            optimizer.zero_grad()
            (-(logits.softmax(-1) * rewards).sum(-1).mean()).backward()
            optimizer.step()
        entropies.append(entropy(logits).mean().item())
    linear, perceptron, wide_linear, wide_perceptron = entropies
    assert 0.1 < linear < 0.6 and 0.1 < perceptron < 0.6
    assert wide_linear == pytest.approx(linear, abs=0.01) and wide_perceptron == pytest.approx(perceptron, abs=0.01)


def test_a2c_solves_a_known_optimum(duo, windows):
    env = Lockstep(duo, windows, windows_per_batch=8, group_size=4, reward=PrefersBigInLayerOne())
    agent = agents.A2C(env, learning_rate=0.1)
    returns = []
    router = agent.learn(60 * agent.decisions_per_update, lambda _, seen, __: returns.append(seen["rollout/return"]))
    assert returns[0] < 0 < 0.9 < returns[-1]
    assert _routes(duo, router, windows) == [1, 2, 1]


class Charges(Reward):
    """A known optimum that depends on the price: compute is worth 0.5, and costs the price."""

    def __init__(self, price: float = 0.1):
        self.price = price

    def __call__(self, step):
        return 3 * (0.5 - self.price) * step.compute


@pytest.mark.parametrize("agent", ["PPO", "A2C", "REINFORCE", "ReinMax"])
def test_one_router_answers_for_all_prices(duo, windows, agent):
    env = Lockstep(duo, windows, windows_per_batch=8, group_size=4, reward=Charges(), prices=(0.1, 2.5))
    learner = getattr(agents, agent)(env, learning_rate=0.03)
    router = learner.learn(80 * learner.decisions_per_update)
    assert _routes(duo, router.at(price=0.15), windows) == [2, 2, 2]
    assert _routes(duo, router.at(price=2.0), windows) == [1, 1, 1]
    with pytest.raises(ValueError, match=r"use router\.at"):
        _routes(duo, router, windows)
    with pytest.raises(ValueError, match=r"outside of 0\.1 to 2\.5"):
        router.at(price=3.0)


def test_reinmax_is_exact_where_the_reward_is_quadratic_in_the_choice():
    """The mean over choices of sum_a e_a grad pi_a is the gradient of the enumerated expectation."""
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(4, generator=generator, dtype=torch.double, requires_grad=True)
    square = torch.randn(4, 4, generator=generator, dtype=torch.double)
    linear = torch.randn(4, generator=generator, dtype=torch.double)
    ends = torch.eye(4, dtype=torch.double)
    rewards = torch.stack([end @ square @ end + linear @ end for end in ends])
    slopes = ends @ (square + square.T) + linear  # (choices, A)
    shares = scores.softmax(-1)
    exact = torch.autograd.grad(shares @ rewards, scores, retain_graph=True)[0]
    effects = action_effects(slopes, ends, shares.detach().expand(4, 4), least_share=0.0)
    expected = shares.detach() @ effects
    estimate = torch.autograd.grad(shares @ expected, scores)[0]
    assert torch.allclose(estimate, exact)


def test_reinmax_is_exact_for_rare_choices_where_the_reward_is_linear():
    """Below the least share the correction shrinks, and the derivatives themselves do not."""
    scores = torch.tensor([0.3, 0.0, -0.3], dtype=torch.double, requires_grad=True)
    slopes, shares = torch.tensor([0.4, -1.0, 2.0], dtype=torch.double).expand(3, 3), (8 * scores).softmax(-1)
    assert shares.min() < 0.1
    exact = torch.autograd.grad(shares @ slopes[0], scores, retain_graph=True)[0]
    effects = action_effects(slopes, torch.eye(3, dtype=torch.double), shares.detach().expand(3, 3), least_share=0.1)
    assert torch.allclose(torch.autograd.grad(shares @ (shares.detach() @ effects), scores)[0], exact)
    masked = action_effects(slopes[0], torch.tensor([1.0, 0, 0]), torch.tensor([0.5, 0.5, 0.0]), least_share=0.0)
    assert masked.isfinite().all()


def _all_joint_routes(tokens, discount):
    """Of a window of 3 tokens, 512 copies side by side: (512, T, L), choices per layer, rewards and credits (L, N)."""
    duo, joint = make_duo("llama"), torch.tensor(list(product(range(2), repeat=9))).view(-1, 3, 3)
    for network in (network for ffn in duo.stack.ffns for network in (ffn.small, ffn.big)):
        network.down_proj.weight.data *= 0.25  # small changes, which derivatives tell
    dynamics = RoutingDynamics(duo, reward=LossImprovement(0.1), group_size=512)
    dynamics.reset(tokens[:1, :4])
    choices, credits, credit = [], [], Credit(dynamics.reward, token_discount=discount)
    for layer in range(3):
        taken = joint[..., layer].flatten()
        choices.append(one_hot(taken, 2).float().requires_grad_())
        credits.append(dynamics.step(taken, choices[-1]) + credit(dynamics))
    return joint, choices, dynamics.rewards, torch.stack(credits)


@pytest.mark.parametrize("discount", [0.02, 0.9])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_discounted_slopes_are_those_of_each_tokens_own_credit(tokens, discount, dtype):
    """Against one backward pass per token; float16 does not hold the weights 0.02^t of a whole window at once."""
    _, choices, rewards, credits = _all_joint_routes(tokens, discount)
    total = credits.sum(0).view(-1, 3).sum(0)  # copies do not touch each other
    naive = [torch.stack(torch.autograd.grad(credit, choices, retain_graph=True)) for credit in total]
    found = discounted_slopes(rewards, choices, discount, 3, dtype).view(3, -1, 3, 2)
    for token in range(3):
        assert torch.allclose(found[:, :, token], naive[token].view(3, -1, 3, 2)[:, :, token], atol=1e-6)


def test_discounted_slopes_are_the_enumerated_advantage_to_second_order(tokens):
    """Of big over small for a uniform policy: the change of the mean of a token's credit over all joint routes."""
    joint, choices, rewards, credits = _all_joint_routes(tokens, 0.5)
    slopes = discounted_slopes(rewards, choices, 0.5, 3).detach().view(3, -1, 3, 2).mean(1)
    credit, big = credits.sum(0).detach().view(-1, 3, 1), joint.float()
    exact = (credit * (2 * big - 1)).mean(0).mul(2).T  # (L, T)
    assert (slopes[..., 1] - slopes[..., 0] - exact).abs().max() < 0.03 * exact.abs().max()


@pytest.mark.parametrize("context", ["routed", "reference"])
def test_reinmax_credits_a_token_as_the_environment_does(duo, windows, context):
    env = Lockstep(duo, windows, windows_per_batch=2, token_discount=0.5, context=context)
    _, chosen, slopes = agents.ReinMax(env)._episode()
    env.seed(0)
    env.draw()
    choices = [layer.clone().requires_grad_() for layer in chosen]
    credits = sum(env.step(choice.argmax(1), choice) for choice in choices)
    for token in (0, 5, 13):
        naive = torch.stack(torch.autograd.grad(credits[token], choices, retain_graph=True))
        assert torch.allclose(slopes[:, token], naive[:, token], atol=1e-6)


def test_reinmax_with_full_correction_is_the_enumerated_policy_gradient():
    """Unbiased up to the fitted scale: the mean over many copies approaches grad sum_r pi(r) G(r)."""
    duo = make_duo("llama")
    windows = torch.randint(61, (1, 2), generator=torch.Generator().manual_seed(5))  # T = 1
    env = Lockstep(duo, windows, windows_per_batch=1, group_size=2000, reward=LossImprovement(0.1))
    agent = agents.ReinMax(env, correction=1.0, last_sharpness=1.0)
    logits, chosen, slopes = agent._episode()
    effects = action_effects(slopes, chosen, logits.softmax(-1).detach(), agent.least_share)
    parameter = agent.router.heads.biases[0]
    (sampled,) = torch.autograd.grad(-agent._unbiased(logits, chosen, effects), parameter)
    exact = torch.autograd.grad(_expected_return(agent.router, env, windows), parameter)[0]
    scale = exact.abs().max()
    assert scale > 1e-3
    assert (sampled - exact).abs().max() < 0.25 * scale


def test_reinmax_learns_what_reinforce_learns(duo, windows):
    """The default reward on few windows: both must come near the best route of all."""
    returns = {}
    for name, options in (("REINFORCE", {}), ("ReinMax", {}), ("ReinMax", {"correction": 0.5})):
        env = Lockstep(duo, windows, windows_per_batch=8, group_size=4, reward=LossImprovement(0.3))
        learner = getattr(agents, name)(env, learning_rate=0.03, **options)
        seen = []
        learner.learn(150 * learner.decisions_per_update, lambda _, m, __, seen=seen: seen.append(m["rollout/return"]))
        returns[name + str(options)] = sum(seen[-10:]) / 10
        assert returns[name + str(options)] > seen[0] + 0.02
    assert max(returns.values()) - min(returns.values()) < 0.3 * (max(returns.values()) - seen[0]), returns


def test_reinmax_refuses_a_correction_without_copies(duo, windows):
    with pytest.raises(ValueError, match="group_size to at least 2"):
        agents.ReinMax(Lockstep(duo, windows, windows_per_batch=2), correction=0.5)


def test_reinmax_refuses_to_count_later_tokens_twice(duo, windows):
    env = Lockstep(duo, windows, windows_per_batch=2, group_size=2, later_effects=True)
    agents.ReinMax(env)
    with pytest.raises(ValueError, match="set later_effects to false"):
        agents.ReinMax(env, correction=0.5)


@pytest.mark.parametrize("agent", ["MaskablePPO", "REINFORCE", "ReinMax"])
@pytest.mark.parametrize("big", [0, 1, 3])
def test_a_hard_budget_is_kept_exactly(duo, windows, agent, big):
    env = Lockstep(duo, windows, windows_per_batch=4, group_size=2, big_layers=big)
    learner = getattr(agents, agent)(env)
    learner.learn(3 * learner.decisions_per_update)
    outcome = learner.vec_env.outcome if agent == "MaskablePPO" else env.outcome
    assert ((outcome.routes == 2).sum(1) == big).all()


def test_maskable_ppos_entropy_counts_only_choices_that_are_open(duo, windows):
    env = Lockstep(duo, windows, windows_per_batch=4, group_size=2, big_layers=3)  # all three: nothing is open
    learner, seen = agents.MaskablePPO(env), []
    learner.learn(1, lambda _, metrics, __: seen.append(metrics["train/entropy"]))
    assert seen == [0.0]


def test_maskable_ppo_finds_the_best_place_for_one_big_layer(duo, windows):
    env = Lockstep(duo, windows, windows_per_batch=8, group_size=4, reward=PrefersBigInLayerOne(), big_layers=1)
    agent = agents.MaskablePPO(env, learning_rate=0.03, epochs=4)
    returns = []
    agent.learn(60 * agent.decisions_per_update, lambda _, seen, __: returns.append(seen["rollout/return"]))
    assert returns[0] < 0.5 < 0.9 < returns[-1]


def test_ppo_refuses_a_hard_budget(duo, windows):
    for agent in (agents.PPO, agents.A2C):
        with pytest.raises(ValueError, match="use MaskablePPO"):
            agent(Lockstep(duo, windows, windows_per_batch=2, big_layers=1))


def test_any_agent_starts_from_a_saved_router(duo, windows, tmp_path):
    env = Lockstep(duo, windows, windows_per_batch=2, group_size=2)
    saved = HeadRouter(3, 32, ("small", "big"), width=5, seed=7)
    saved.save_pretrained(tmp_path / "heads")
    PatternRouter([2, 1, 2]).save_pretrained(tmp_path / "pattern")
    for name in ("PPO", "A2C", "MaskablePPO", "REINFORCE", "ReinMax"):
        router = getattr(agents, name)(env, init=str(tmp_path / "heads")).router
        assert torch.equal(router.heads.weights[0], saved.heads.weights[0])
    assert _routes(duo, agents.PPO(env, init=str(tmp_path / "pattern")).router, windows) == [2, 1, 2]
    HeadRouter(4, 32).save_pretrained(tmp_path / "deeper")
    with pytest.raises(ValueError, match="does not fit: this run needs layers 3"):
        agents.PPO(env, init=str(tmp_path / "deeper"))


def test_target_compute_is_met_by_dual_ascent(duo, windows):
    env = Lockstep(duo, windows, windows_per_batch=8, group_size=4, reward=LossImprovement(0.02))
    agent = agents.REINFORCE(env, learning_rate=0.03)
    prices = []

    def spending(router):
        return measure(duo, router, windows).compute.mean().item()

    dual = TargetCompute(agent, 0.35, spending, price=0.02, tolerance=0.03)
    router = dual.learn(400 * agent.decisions_per_update, lambda _, seen, __: prices.append(seen["train/price"]))
    assert dual.met and spending(router) == dual.compute == pytest.approx(0.35, abs=0.03)
    assert prices[0] == 0.02 and max(prices) > 0.2


def test_target_compute_refuses_what_it_cannot_do(duo, windows):
    agent = agents.REINFORCE(Lockstep(duo, windows, windows_per_batch=2, group_size=2, reward=PrefersBigInLayerOne()))
    with pytest.raises(ValueError, match="no prices"):
        TargetCompute(agent, 0.5, lambda _: 0.5, price=0.1)
    with pytest.raises(ValueError, match="between 0 and 1"):
        TargetCompute(agent, 1.5, lambda _: 0.5, price=0.1)


def test_the_price_for_a_compute_is_found_by_bisection():
    router = HeadRouter(3, 32, prices=(0.01, 1.0))

    def spending(priced):
        return 0.9 - 0.4 * priced.config["price"]

    assert price_for(router, 0.7, spending) == pytest.approx(0.5, rel=0.01)
    with pytest.raises(ValueError, match="out of reach"):
        price_for(router, 0.95, spending)
    with pytest.raises(ValueError, match="one price"):
        price_for(HeadRouter(3, 32), 0.5, spending)


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
    assert rates == pytest.approx([0.1, 0.075, 0.05, 0.025])
    agent.learn(4 * agent.decisions_per_update, note)
    assert rates[4:] == pytest.approx([0.05, 0.0375, 0.025, 0.0125])  # it goes on in the plan, now twice as long


def test_ppos_group_advantages_are_leave_one_out(duo, windows):
    env = Lockstep(duo, windows, windows_per_batch=2, group_size=2)
    agent = agents.PPO(env)
    agent.learn(1)
    buffer = agent.algorithm.rollout_buffer
    returns = rewards_to_go(torch.from_numpy(buffer.rewards))
    assert torch.equal(torch.from_numpy(buffer.advantages), returns - leave_one_out(returns, 2))


def test_leave_one_out_without_copies_is_refused(duo, windows):
    with pytest.raises(ValueError, match="group_size to at least 2"):
        agents.REINFORCE(Lockstep(duo, windows, windows_per_batch=2))


def test_the_vector_environment_is_the_one_sb3_sees(duo, windows):
    agent = agents.PPO(Lockstep(duo, windows, windows_per_batch=2))
    assert isinstance(agent.vec_env, RoutingVecEnv) and agent.algorithm.n_steps == 3
