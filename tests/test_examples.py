"""The example rewards: against numbers computed by hand, and from the command line."""

import json
import math
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import TINY

import duorl
from duorl import agents
from duorl.cli import main
from duorl.envs import Lockstep, RoutingDynamics
from duorl.rewards import LossImprovement, Reward, Step, with_price

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # where a user of the examples stands

from examples import difficulty, latency, smooth  # noqa: E402
from examples.difficulty import HardTokens  # noqa: E402
from examples.latency import LatencyPrice  # noqa: E402
from examples.smooth import SmoothRoutes  # noqa: E402


def decision(action, *, layer=1, previous=None, loss=None, reference_loss=None):
    """A step of N tokens whose big networks cost 0.5, the small ones 0.1."""
    action = torch.tensor(action)
    compute = torch.tensor([0.0, 0.1, 0.5])[action]
    nothing = torch.zeros(len(action), 1)
    losses = [None if x is None else torch.tensor(x) for x in (loss, reference_loss)]
    return Step(layer, action, compute, nothing, nothing, loss is not None, *losses, previous=previous)


def episodes(model, tokens, reward, routes):
    """The (L, N) rewards of given routes (N, L)."""
    dynamics = RoutingDynamics(model, reward=reward, actions=("skip", "small", "big"))
    dynamics.reset(tokens)
    while not dynamics.done:
        dynamics.step(routes[:, dynamics.layer])
    return dynamics.outcome.rewards


def test_each_change_of_network_is_charged():
    reward = SmoothRoutes(price=0.2, charge=0.03)
    first = decision([0, 1, 2, 2], layer=0)
    assert reward(first).tolist() == pytest.approx([0, -0.02, -0.1, -0.1])
    second = decision([1, 1, 1, 2], previous=first, loss=[1.0] * 4, reference_loss=[1.5] * 4)
    assert reward(second).tolist() == pytest.approx([0.45, 0.48, 0.45, 0.4])


def test_a_route_pays_for_as_many_changes_as_it_has(duo, tokens):
    routes = torch.randint(3, (14, 3), generator=torch.Generator().manual_seed(0))
    changes = (routes.diff(dim=1) != 0).sum(1)
    smoothed = episodes(duo, tokens, SmoothRoutes(0.3, charge=0.1), routes).sum(0)
    plain = episodes(duo, tokens, LossImprovement(0.3), routes).sum(0)
    assert torch.allclose(plain - smoothed, 0.1 * changes, atol=1e-6)


def test_a_hard_tokens_gain_counts_more():
    step = decision([2, 2, 2], loss=[1.0, 2.0, 5.0], reference_loss=[1.5, 1.5, 6.0])  # mean reference 3
    earned = [0.5 * 0.5 - 0.1, 0.5 * -0.5 - 0.1, 2.0 * 1.0 - 0.1]
    assert HardTokens(0.2, power=1.0)(step).tolist() == pytest.approx(earned)
    assert HardTokens(0.2).contextual(step).tolist() == pytest.approx([0.25, -0.25, 2.0])
    assert HardTokens(0.2)(decision([2, 1, 0])).tolist() == pytest.approx([-0.1, -0.02, 0])
    assert torch.equal(HardTokens(0.2, power=0.0)(step), LossImprovement(0.2)(step))
    with pytest.raises(ValueError, match="power must be at least 0"):
        HardTokens(power=-1)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 3.0])
def test_weights_average_1_and_grow_with_the_loss(power):
    weights = difficulty.weights(torch.tensor([0.5, 1.0, 4.0]), power)
    assert weights.mean().item() == pytest.approx(1)
    assert (weights[2] / weights[1]).item() == pytest.approx(4**power)


def test_time_shares_of_all_big_sum_to_1():
    seconds = torch.tensor([[0.0, 1.0, 3.0], [0.0, 1.0, 1.0]])
    assert latency.time_shares(seconds).tolist() == [[0, 0.25, 0.75], [0, 0.25, 0.25]]


def test_time_is_charged_as_measured():
    reward = LatencyPrice(price=0.4, tokens=512, repeats=5)
    shares = reward.shares
    assert shares.shape == (8, 3) and (shares[:, 0] == 0).all()
    assert shares[:, 2].sum().item() == pytest.approx(1)
    flops = duorl.load("duo-tiny").action_compute
    assert (shares[:, 1] > 0).all() and shares[:, 1].sum() < 0.5  # a sixteenth of the FLOPs
    assert flops[:, 1].sum().item() == pytest.approx(1 / 16)
    step = decision([0, 1, 2], layer=3, loss=[2.0] * 3, reference_loss=[2.5] * 3)
    assert torch.allclose(reward(step), 0.5 - 0.4 * shares[3])


@pytest.mark.parametrize("make", [HardTokens, SmoothRoutes, partial(LatencyPrice, tokens=8, repeats=1)])
def test_a_run_may_vary_the_examples_prices(make):
    varied, set_price = with_price(make())
    set_price(torch.tensor([0.0, 1.0]))
    free, dear = varied(decision([2, 2]))
    assert free == 0 and dear < 0


@pytest.mark.slow
@pytest.mark.parametrize("module", [latency, difficulty, smooth], ids=lambda module: module.__name__)
def test_the_command_in_an_examples_docstring_trains(module, tmp_path, small_corpus, monkeypatch):
    (tmp_path / "tiny.yaml").write_text(f"{TINY}corpus: ['{small_corpus}']\n")
    (command,) = [line for line in module.__doc__.splitlines() if line.startswith("    python train.py")]
    short = ["--config", str(tmp_path / "tiny.yaml"), "--total_decisions", "4000", "--out", str(tmp_path / "run")]
    words = [*shlex.split(command)[1:], *short, "--rivals=[]"]
    monkeypatch.chdir(ROOT)
    if module is smooth:  # one of them as it is typed
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    else:
        main(["train", *words[1:]])
    comparison = json.loads((tmp_path / "run" / "comparison.json").read_text())
    reward = comparison["settings"]["reward"]
    module_name, class_name = reward["class_path"].rsplit(".", 1)
    assert module_name == module.__name__ and issubclass(getattr(module, class_name), Reward)
    assert comparison["settings"]["price"] == reward["init_args"]["price"] == 0.3
    row = next(row for row in comparison["rows"] if row["router"] == "PPO")
    assert math.isfinite(row["loss"]) and 0 < row["compute"] <= 1
    assert row["actions"]["small"] + row["actions"]["big"] == pytest.approx(1)


@pytest.mark.slow
def test_a_high_charge_ends_in_routes_that_never_change(duo):
    windows = torch.randint(61, (8, 8), generator=torch.Generator().manual_seed(2))
    changes = {}
    for charge in (0.0, 1.0):
        env = Lockstep(duo, windows, windows_per_batch=2, group_size=4, reward=SmoothRoutes(price=0.0, charge=charge))
        agent = agents.REINFORCE(env, learning_rate=0.03)
        agent.learn(200 * agent.decisions_per_update)
        changes[charge] = env.outcome.routes.diff(dim=1).abs().float().mean().item()
    assert changes[1.0] < 0.02 < 0.2 < changes[0.0]
