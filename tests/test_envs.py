"""The Gymnasium and SB3 environments."""

import math
import subprocess
import sys

import gymnasium
import numpy as np
import pytest
import stable_baselines3.common.env_checker
import torch
from conftest import make_duo
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from stable_baselines3.common.vec_env import VecMonitor

from duorl import envs
from duorl.costs import BIG, SMALL
from duorl.envs import DuoRoutingEnv, DuoRoutingVectorEnv, Lockstep, RoutingDynamics, RoutingVecEnv, later
from duorl.envs.order import WindowOrder
from duorl.oracle import exhaustive
from duorl.rewards import LogitLensShaping, LossImprovement, Reward, TeacherKL
from duorl.routed_pass import RoutedPass


@pytest.fixture
def windows():
    return torch.randint(61, (6, 8), generator=torch.Generator().manual_seed(2))


def finish(env, actions):
    """Play fixed actions; returns the rewards and the last info."""
    rewards = []
    for action in actions:
        observation, reward, terminated, truncated, info = env.step(action)
        assert env.observation_space.contains(observation) and not truncated
        rewards.append(reward)
    assert terminated
    return rewards, info


def test_both_env_checkers_pass(duo, windows):
    env = gymnasium.make("duorl/Routing-v0", model=duo, windows=windows, render_mode="ansi")
    check_env(env.unwrapped)
    assert stable_baselines3.common.env_checker.check_env(env.unwrapped) is None


def test_an_episode_is_the_oracles_table_entry(duo, windows):
    """Every route of one token, played, gives the loss that the exhaustive search found."""
    env = DuoRoutingEnv(duo, windows=windows, reward=LossImprovement(0.3))
    table = exhaustive(duo, windows[2:3], context="reference")
    for number, route in enumerate(table.routes):
        env.reset(options={"window": 2, "position": 5})
        rewards, info = finish(env, (route - 1).tolist())
        assert info["loss"] == pytest.approx(table.losses[0, 5, number].item(), abs=1e-5)
        assert info["compute"] == pytest.approx(table.compute[number].item())
        assert sum(rewards) == pytest.approx(info["gain"] - 0.3 * info["compute"], abs=1e-5)
        assert info["route"] == ["small" if action == 1 else "big" for action in route]


def test_a_batch_of_n_equals_n_single_episodes(duo, windows):
    batch = gymnasium.make_vec("duorl/Routing-v0", num_envs=5, model=duo, windows=windows)
    batch.reset(seed=11)
    actions = np.random.default_rng(0).integers(2, size=(3, 5))
    batch_rewards = []
    for layer in range(3):
        _observations, rewards, terminated, _, infos = batch.step(actions[layer])
        batch_rewards.append(rewards)
    assert terminated.all()
    for number in range(5):
        env = DuoRoutingEnv(duo, windows=windows)
        env.reset(seed=11 + number)
        rewards, info = finish(env, actions[:, number])
        assert np.allclose(rewards, np.array(batch_rewards)[:, number], atol=1e-5)
        assert infos["final_info"]["loss"][number] == pytest.approx(info["loss"], abs=1e-5)
        assert infos["final_obs"][number]["layer"] == 3


@pytest.mark.parametrize("context", ["routed", "reference"])
def test_whole_windows_with_copies(duo, windows, context):
    options = {"tokens_per_window": 7, "group_size": 2, "context": context}
    env = DuoRoutingVectorEnv(28, duo, windows=windows, **options)
    observations, _ = env.reset(seed=0)
    assert env.observation_space.contains(observations)
    copies = observations["hidden"].reshape(2, 14, -1)
    assert np.array_equal(copies[0], copies[1])
    for _ in range(3):
        _, rewards, terminated, _, _ = env.step(np.ones(28, int))
    assert terminated.all()
    assert np.allclose(rewards[:14], rewards[14:], atol=1e-6)


def test_seeds_repeat_and_differ(duo, windows):
    def episode(seed):
        env = DuoRoutingVectorEnv(4, duo, windows=windows)
        first = env.reset(seed=seed)[0]["hidden"]
        return np.concatenate([first.ravel(), *(env.step(np.ones(4, int))[1] for _ in range(6))])

    assert np.array_equal(episode(3), episode(3))
    assert not np.array_equal(episode(3), episode(4))


def test_render_draws_the_route(duo, windows):
    env = gymnasium.make("duorl/Routing-v0", model=duo, windows=windows, actions=("big", "skip"), render_mode="ansi")
    env.reset(options={"window": 1, "position": 2})
    assert env.render() == "window 1 position 2: ___"
    env.step(0)
    env.step(1)
    assert env.render() == "window 1 position 2: .B_"


def test_the_sb3_skin_steps_all_tokens_and_begins_again(duo, windows):
    env = RoutingVecEnv(Lockstep(duo, windows, windows_per_batch=2, group_size=2))
    assert env.num_envs == 28
    first = env.reset()
    for layer in range(3):
        observations, _rewards, dones, _infos = env.step(np.zeros(28, int))
        assert dones.all() == (layer == 2)
    assert env.outcome is not None and torch.allclose(env.outcome.gain, torch.zeros(28), atol=1e-6)
    assert (observations["layer"] == 0).all() and not np.array_equal(first["hidden"], observations["hidden"])


def test_every_window_comes_once_before_any_comes_again(windows):
    order = WindowOrder(6, 2, np.random.default_rng(0))
    assert sorted(np.concatenate([next(order) for _ in range(3)])) == list(range(6))


@pytest.mark.parametrize("drawn", [0, 1, 3, 7])
def test_an_order_goes_on_where_it_was(drawn):
    order, other = WindowOrder(7, 2, np.random.default_rng(0)), WindowOrder(7, 2, np.random.default_rng(1))
    for _ in range(drawn):
        next(order)
    other.restore(order.state())
    assert np.array_equal([next(order) for _ in range(8)], [next(other) for _ in range(8)])


@pytest.mark.parametrize("begun", [False, True])
def test_a_lockstep_goes_on_with_the_episode_that_was_to_come(duo, windows, begun):
    """Also where it is drawn already, as Stable-Baselines3 has it at the end of every update."""
    options = {"windows_per_batch": 2, "prices": (0.1, 1.0)}
    env, other = Lockstep(duo, windows, **options), Lockstep(duo, windows, seed=5, **options)
    env.draw()
    while not env.done:
        env.step(torch.zeros(14, dtype=torch.int64))
    if begun:
        env.draw()
    other.restore(env.state())
    other.draw()
    if not begun:
        env.draw()
    assert torch.equal(env.hidden, other.hidden) and torch.equal(env.view.price, other.view.price)


def test_the_reference_pass_is_made_once_for_every_window(duo, windows, monkeypatch):
    env = Lockstep(duo, windows, windows_per_batch=3)
    for _ in range(2):
        env.draw()
    known = env._known_losses.clone()
    assert known.isfinite().all()
    monkeypatch.setattr(env, "reference", None)  # asked again it would fail
    for _ in range(2):
        env.draw()
    assert torch.equal(env._known_losses, known)
    alone = RoutingDynamics(duo)
    alone.reset(windows)
    assert torch.allclose(alone.reference_loss, known.flatten(), atol=1e-6)


def test_gymnasium_finds_the_environment_by_the_modules_name():
    code = "import gymnasium; print(gymnasium.make('duorl:duorl/Routing-v0').reset(seed=0)[0]['layer'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "0", done.stderr


def test_a_token_is_credited_with_later_gains_of_its_own_window_only(duo, windows):
    env = Lockstep(duo, windows, windows_per_batch=2, group_size=2, token_discount=0.5)
    env.draw()
    generator = torch.Generator().manual_seed(0)
    while not env.done:
        env.step(torch.randint(2, (28,), generator=generator))
    outcome = env.outcome
    gain = outcome.gain.view(4, 7)
    for t in range(7):
        later = sum(0.5 ** (s - t) * gain[:, s] for s in range(t + 1, 7))
        credit = (outcome.credits - outcome.rewards).sum(0).view(4, 7)[:, t]
        assert torch.allclose(credit, later + torch.zeros(4), atol=1e-6)


def test_the_environment_itself_pays_without_credit(duo, windows):
    dynamics = envs.RoutingDynamics(duo)
    dynamics.reset(windows[:2])
    with pytest.raises(RuntimeError, match="nothing is decided yet"):
        dynamics.contextual()
    while not dynamics.done:
        dynamics.step(torch.ones(14, dtype=torch.int64))
    assert torch.equal(dynamics.outcome.credits, dynamics.outcome.rewards)
    assert torch.equal(dynamics.contextual(), dynamics.outcome.gain)


def test_a_forked_episode_goes_on_by_itself(duo, windows):
    """As if it had been played alone, and the other one as if there were no fork."""

    def played(routes, fork_at=None):
        env = envs.RoutingDynamics(duo, big_layers=1, reward=LossImprovement(0.3) + LogitLensShaping())
        env.reset(windows[:2])
        for layer, choice in enumerate(routes):
            if layer == fork_at:
                other = env.fork()
                other.step(torch.ones(14, dtype=torch.int64))
            env.step(torch.full((14,), choice))
        return env.outcome if fork_at is None else (env.outcome, other)

    whole, (also, other) = played([0, 1, 0]), played([0, 1, 0], fork_at=1)
    assert torch.equal(whole.rewards, also.rewards) and torch.equal(whole.routes, also.routes)
    other.step(torch.zeros(14, dtype=torch.int64))
    assert torch.equal(other.outcome.rewards, whole.rewards)


def test_effects_are_differences_of_passes(duo, windows, monkeypatch):
    """If all tokens change, no effect on unchanged tokens is left; the last layer has none in any case."""
    monkeypatch.setattr(later, "_LEAST", 1)
    few, shape = {"batch": 3}, (*windows[:, 1:].shape, duo.num_layers)
    env = envs.RoutingDynamics(duo, reward=LossImprovement(0.3))
    small, big = torch.full(shape, SMALL), torch.full(shape, BIG)
    for base, chosen, instead in ((small, SMALL, BIG), (big, BIG, SMALL)):
        before = RoutedPass(duo, windows).follow(base).losses().mean().item()
        found = later.effects(env, windows, base, chosen=chosen, instead=instead, share=1.1, **few)
        for layer, effect in enumerate(found):
            routes = base.clone()
            routes[..., layer] = instead
            after = RoutedPass(duo, windows).follow(routes).losses().mean().item()
            assert effect.own == pytest.approx(before - after, abs=1e-5)
            assert effect.later == 0 and effect.share == 1
    assert math.isnan(later.effects(env, windows, small, chosen=BIG, instead=SMALL)[0].own)
    some = later.effects(env, windows, small, chosen=SMALL, instead=BIG)
    assert some[-1].later == 0 and some[0].later != 0


def test_the_effect_on_later_tokens_is_that_of_one_changed_token(duo, windows, monkeypatch):
    """With one changed token per window, the effect is what the loss of all others changes."""
    monkeypatch.setattr(later, "_LEAST", 1)
    only = torch.ones(*windows[:, 1:].shape, duo.num_layers, dtype=torch.int64)
    only[:, 2] = BIG
    routes = only.clone()
    routes[:, 2, 0] = SMALL
    losses = [RoutedPass(duo, windows).follow(taken).losses() for taken in (only, routes)]
    env = envs.RoutingDynamics(duo)
    found = later.effects(env, windows, only, chosen=BIG, instead=SMALL, share=1.1)[0]
    gains = losses[0] - losses[1]
    assert found.own == pytest.approx(gains[:, 2].mean().item(), abs=1e-5)
    assert found.later == pytest.approx(gains[:, 3:].sum(1).mean().item(), abs=1e-5)
    assert gains[:, :2].abs().max() < 1e-5


class Worth(Reward):
    """A multiple of the gain."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, step):
        return self.contextual(step)

    def contextual(self, step):
        return self.factor * step.gain


def test_effects_on_later_tokens_are_in_the_unit_of_the_reward(duo, windows, monkeypatch):
    monkeypatch.setattr(later, "_LEAST", 1)
    base = later.mean_effects(envs.RoutingDynamics(duo), windows)
    assert base[0, 2] != 0
    for factor in (-100.0, 0.5):
        assert torch.allclose(
            later.mean_effects(envs.RoutingDynamics(duo, reward=Worth(factor)), windows), factor * base
        )
    other = later.mean_effects(envs.RoutingDynamics(duo, reward=TeacherKL(0.3)), windows)
    assert not torch.allclose(other, base, atol=1e-4)


@pytest.mark.parametrize("prices", [None, (0.1, 1.0)])
def test_an_action_is_credited_with_its_layers_effect_on_later_tokens(duo, windows, monkeypatch, prices):
    monkeypatch.setattr(later, "_LEAST", 1)
    options = {"windows_per_batch": 2, "later_effects": True, "actions": ("skip", "small", "big"), "prices": prices}
    env = Lockstep(duo, windows, **options)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        env.draw()
        while not env.done:
            env.step(torch.randint(3, (14,), generator=generator))
    outcome, table = env.outcome, env.state()["later"]
    assert table.shape == (3, 3) and (table[:, 0] == 0).all() and (table[:-1, 1:] != 0).all()
    assert torch.allclose(outcome.credits - outcome.rewards, table[torch.arange(3)[:, None], outcome.routes.T])
    again = Lockstep(duo, windows, **options)
    again.restore(env.state())
    assert torch.equal(again.state()["later"], table)


@pytest.mark.parametrize("option", [{"token_discount": 0.5}, {"later_effects": True}])
def test_a_reward_without_a_contextual_part_cannot_be_credited(duo, windows, option):
    (name,) = option
    for reward in (lambda step: step.gain, LogitLensShaping()):
        with pytest.raises(ValueError, match=f"{name} credits .* has none: give a Reward that defines contextual"):
            Lockstep(duo, windows, windows_per_batch=2, reward=reward, **option)
    Lockstep(duo, windows, windows_per_batch=2, reward=LogitLensShaping() + LossImprovement(0.1), **option)


def test_bad_arguments_are_refused(duo, windows):
    for options, message in (
        ({"num_envs": 5, "tokens_per_window": 7}, "multiple of 7"),
        ({"num_envs": 7, "tokens_per_window": 3}, "must be 1 or the window's 7"),
        ({"num_envs": 7, "context": "routed"}, "whole windows"),
        ({"num_envs": 7, "actions": ("small", "huge")}, "unknown action 'huge'"),
    ):
        with pytest.raises(ValueError, match=message):
            DuoRoutingVectorEnv(model=duo, windows=windows, **options)
    with pytest.raises(ValueError, match="out of range"):
        DuoRoutingEnv(duo, windows=windows).reset(options={"window": 6, "position": 0})
    with pytest.raises(ValueError, match="does not change what later ones read"):
        Lockstep(duo, windows, later_effects=True, context="reference")
    with pytest.raises(ValueError, match="a batch takes 9"):
        Lockstep(duo, windows, windows_per_batch=9)
    with pytest.raises(ValueError, match="is trainable"):
        DuoRoutingEnv(make_duo("gpt2").requires_grad_(True), windows=windows)


def same(one, other):
    """Equal structure, types, and numbers but for rounding."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        return all(same(one[key], other[key]) for key in one)
    if isinstance(one, np.ndarray) and one.dtype == object:
        return one.shape == other.shape and all(same(*pair) for pair in zip(one, other, strict=True))
    if isinstance(one, np.ndarray):
        assert one.dtype == other.dtype and one.shape == other.shape
        return np.allclose(one, other, atol=1e-5)
    return bool(np.allclose(one, other, atol=1e-5)) if isinstance(one, np.number) else one == other


@pytest.mark.parametrize("options", [None, {"window": 2, "position": 3}, {"window": 4}])
@pytest.mark.parametrize("seed", [5, [9, 8, 7]])
def test_the_vector_environment_is_gymnasiums_own_of_single_ones(duo, windows, options, seed):
    """Observations, rewards, ends and infos of every step, over an autoreset, and of another reset."""
    arguments = {"model": duo, "windows": windows, "actions": ("skip", "small", "big"), "inputs": ("update_norm",)}
    arguments |= {"reward": lambda step: step.gain - 0.2 * step.compute, "render_mode": "ansi"}
    mode = AutoresetMode.SAME_STEP
    theirs = SyncVectorEnv([lambda: DuoRoutingEnv(**arguments) for _ in range(3)], autoreset_mode=mode)
    ours = gymnasium.make_vec("duorl/Routing-v0", num_envs=3, **arguments)
    assert ours.metadata["autoreset_mode"] == theirs.metadata["autoreset_mode"]
    assert ours.action_space == theirs.action_space and ours.observation_space == theirs.observation_space
    for again in (seed, None):
        first, second = (env.reset(seed=again, options=options) for env in (ours, theirs))
        assert all(same(one, other) for one, other in zip(first, second, strict=True))
        for actions in np.random.default_rng(0).integers(3, size=(5, 3)):
            assert ours.render() == theirs.render()
            first, second = ours.step(actions), theirs.step(actions)
            assert ours.observation_space.contains(first[0])
            assert all(same(one, other) for one, other in zip(first, second, strict=True))


def test_gymnasiums_wrappers_take_the_vector_environment(duo, windows):
    env = gymnasium.make_vec("duorl/Routing-v0", num_envs=4, model=duo, windows=windows)
    wrapped = gymnasium.wrappers.vector.DictInfoToList(gymnasium.wrappers.vector.RecordEpisodeStatistics(env))
    wrapped.reset(seed=1)
    total = np.zeros(4)
    for _ in range(3):
        *_, rewards, _, _, infos = (None, *wrapped.step(np.ones(4, int)))
        total += rewards
    assert [info["episode"]["r"] for info in infos] == pytest.approx(total)
    assert [info["final_info"]["route"] for info in infos] == [["big"] * 3] * 4


@pytest.mark.parametrize("vector", [False, True])
def test_both_environments_refuse_the_same(duo, windows, vector):
    """Actions and options; `some` makes one action what the environment takes."""

    def some(action):
        return np.array([0, action]) if vector else action

    make = gymnasium.make_vec if vector else gymnasium.make
    env = make("duorl/Routing-v0", **({"num_envs": 2} if vector else {}), model=duo, windows=windows).unwrapped
    with pytest.raises(RuntimeError, match="call reset"):
        env.step(some(0))
    for options in ({"window": 6}, {"position": 7}, {"window": -1}):
        with pytest.raises(ValueError, match="out of range"):
            env.reset(options=options)
    for options, message in (({"window": 1.5}, "a whole number"), ({"windows": 1}, "not 'windows'")):
        with pytest.raises(ValueError, match=message):
            env.reset(options=options)
    env.reset(seed=0)
    for action in (2, -1, 0.5, True):
        with pytest.raises(ValueError, match=r"from 0 to 1 \(small, big\)"):
            env.step(some(action) if action is not True else np.array([True] * (1 + vector)))
    env.step(some(1))
    assert env.dynamics.layer == 1  # what was refused did not count


def test_the_vector_environment_refuses_what_only_it_can_be_told(duo, windows):
    env = DuoRoutingVectorEnv(2, duo, windows=windows)
    with pytest.raises(ValueError, match="one for each of the 2 tokens, not 3"):
        env.reset(seed=[1, 2, 3])
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"shape \(2,\), not \(3,\)"):
        env.step([0, 0, 0])
    with pytest.raises(ValueError, match="together or not at all"):
        env.reset(options={"reset_mask": np.array([True, False])})
    env.close()
    with pytest.raises(gymnasium.error.ClosedEnvironmentError):
        env.step([0, 0])
    with pytest.raises(ValueError, match="a window alone"):
        DuoRoutingVectorEnv(7, duo, windows=windows, tokens_per_window=7).reset(options={"position": 1})
    with pytest.raises(ValueError, match="longer than the model's 64 positions"):
        DuoRoutingEnv(duo, windows=torch.zeros(2, 66, dtype=torch.int64))
    with pytest.raises(ValueError, match="holds token 61, but the model knows 0 to 60"):
        DuoRoutingEnv(duo, windows=windows + 1 + 60 - windows.max())


def test_stable_baselines_is_told_of_the_last_observation(duo, windows):
    env = VecMonitor(RoutingVecEnv(Lockstep(duo, windows, windows_per_batch=1)))
    env.reset()
    for layer in range(3):
        observations, _, _, infos = env.step(np.zeros(7, int))
        assert all(("terminal_observation" in info) == (layer == 2) for info in infos)
    assert [info["terminal_observation"]["layer"] for info in infos] == [3] * 7 and (observations["layer"] == 0).all()
    assert all(info["episode"]["l"] == 3 and not info["TimeLimit.truncated"] for info in infos)
    with pytest.raises(ValueError, match="from 0 to 1"):
        env.step(np.full(7, 2))


def test_what_an_environment_gives_can_be_changed_in_place(duo, windows):
    """Wrappers scale observations and rewards, and users reuse their array of actions."""
    lockstep = Lockstep(duo, windows, windows_per_batch=2)
    makes = {
        "single": lambda: DuoRoutingEnv(duo, windows=windows),
        "vector": lambda: DuoRoutingVectorEnv(3, duo, windows=windows),
        "sb3": lambda: RoutingVecEnv(lockstep),
    }
    for name, make in makes.items():
        outcomes = []
        for spoils in (False, True):
            env = make()
            lockstep.seed(0)
            observation = env.reset() if name == "sb3" else env.reset(seed=0)[0]
            dynamics = lockstep if name == "sb3" else env.dynamics
            for _ in range(dynamics.layers - 1):
                actions = 1 if name == "single" else np.ones(len(observation["hidden"]), dtype=np.int64)
                observation, rewards = env.step(actions)[:2]
                if spoils:
                    observation["hidden"] *= 0
                    observation["compute"] += 7
                    rewards *= 5
                    actions *= 0
            final = dynamics._walk.residual.clone(), torch.stack(dynamics._rewards), torch.stack(dynamics._actions)
            outcomes.append(final)
        for plain, spoiled in zip(*outcomes, strict=True):
            assert torch.equal(plain, spoiled), name
