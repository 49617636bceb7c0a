"""Several ranks learn what one process learns from twice the windows, and one of them writes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoConfig, AutoModelForCausalLM

from duorl import ranks
from duorl.agents.rollouts import choose
from duorl.cli import main

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
LEARNERS = """
import sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
import duorl
from duorl import agents, learners, ranks
from duorl.envs import Lockstep
from duorl.rewards import LossImprovement

torch.set_num_threads(1)
ranks.connect()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval().requires_grad_(False)
windows = torch.randint(61, (12, 10), generator=torch.Generator().manual_seed(3))
def env(**options):
    batch = 4 // ranks.count()
    return Lockstep(model, windows, reward=LossImprovement(0.1), windows_per_batch=batch, **options)
pairs = {"group_size": 2}
made = {
    "REINFORCE": agents.REINFORCE(env(**pairs, prices=(0.01, 1.0))),
    "mean": agents.REINFORCE(env(), baseline="mean"),
    "GFlowNet": agents.GFlowNet(env()),
    "ReinMax": agents.ReinMax(env()),
    "correction": agents.ReinMax(env(**pairs), correction=0.5),
    "Soft": learners.Soft(env(prices=(0.01, 1.0)), updates=20),
    "budget": learners.Soft(env(), budget=0.5, updates=20),
    "Supervised": learners.Supervised(env(), windows=5, epochs=3),
    "deviations": learners.Supervised(env(), windows=5, epochs=3, base="random"),
    "KNN": learners.KNN(env(), windows=5, neighbours=3),
    "Ensemble": learners.Ensemble(env(), windows=5, epochs=3),
    "PPO": agents.PPO(env(**pairs)),
    "A2C": agents.A2C(env(**pairs)),
    "DQN": agents.DQN(env(), batch_size=64),
}
for name, learner in made.items():
    router = learner.learn(10 * learner.decisions_per_update)
    save_file(dict(router.state_dict()), f"{sys.argv[2]}-{name}-{ranks.rank()}.safetensors")
"""
STATISTICAL = {"PPO", "A2C", "DQN"}


def ranked(words, folder):
    """Run a script or module with two ranks."""
    return subprocess.run([*TORCHRUN, *words], cwd=folder, env=ONE_THREAD, capture_output=True, text=True)


@pytest.fixture(scope="module")
def learned(duo, tmp_path_factory):
    """Routers by learner and rank, of one process and of two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    duo.save_pretrained(folder / "model")
    (folder / "learners.py").write_text(LEARNERS)
    alone = [sys.executable, "learners.py", "model", "one"]
    for done in (
        subprocess.run(alone, cwd=folder, env=ONE_THREAD, capture_output=True, text=True),
        ranked(["learners.py", "model", "two"], folder),
    ):
        assert done.returncode == 0, done.stderr
    return {path.stem: load_file(path) for path in folder.glob("*.safetensors")}


def distance(one, other):
    assert one.keys() == other.keys()
    return max((one[name].float() - other[name].float()).abs().max().item() for name in one)


@pytest.mark.slow
def test_two_ranks_learn_what_one_process_learns_from_twice_the_windows(learned):
    names = {name.split("-")[1] for name in learned}
    assert len(names) == 14
    for name in names:
        first, second = learned[f"two-{name}-0"], learned[f"two-{name}-1"]
        assert distance(first, second) == 0, name
        if name not in STATISTICAL:
            assert distance(learned[f"one-{name}-0"], first) < 1e-5, name


@pytest.mark.parametrize("copies", [1, 2])
def test_actions_are_drawn_as_torch_draws_them(copies):
    shares = torch.rand(24, 3, generator=torch.Generator().manual_seed(0)).softmax(-1)
    own, torchs = (torch.Generator().manual_seed(1) for _ in range(2))
    for _ in range(3):
        assert torch.equal(choose(shares, own, copies), torch.multinomial(shares, 1, generator=torchs))


def test_a_process_alone_is_the_first_of_one(monkeypatch):
    values = torch.rand(4, 3)
    assert ranks.first() and ranks.count() == 1
    assert torch.equal(ranks.own(values), values) and ranks.mean(values) is values and ranks.joined(values) is values
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not ranks.first() and torch.equal(ranks.own(values), values[2:])


CONFIG = """
corpus: [text.txt]
device: cpu
env: {windows_per_batch: 1, group_size: 2, window: 32}
evaluation: {windows: 4, reference_windows: 1, fixed_windows: 1, finalists: 2, final_windows: 2, bound: none}
validations: 3
save_every: 0
agent: REINFORCE
rivals: []
total_decisions: 16000
"""
TRAIN = ["-m", "duorl", "train", "--config", "ranks.yaml"]


@pytest.fixture(scope="module")
def place(small_corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    (folder / "text.txt").write_text(Path(small_corpus).read_text()[:400_000])
    (folder / "ranks.yaml").write_text(CONFIG)
    return folder


@pytest.mark.slow
def test_a_run_of_two_ranks_is_written_once_and_goes_on_after_a_stop(place, monkeypatch):
    monkeypatch.chdir(place)
    done = ranked([*TRAIN, "--out", "whole"], place)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote whole/") == 1
    main(["train", "--config", "ranks.yaml", "--env.windows_per_batch", "2", "--threads", "1", "--out", "one"])
    started = subprocess.Popen([*TORCHRUN, *TRAIN, "--out", "stopped"], cwd=place, env=ONE_THREAD)
    while not Path("stopped/router/checkpoint.safetensors").is_file():
        time.sleep(0.1)
        assert started.poll() is None
    started.send_signal(signal.SIGTERM)
    assert started.wait(60) != 0 and not Path("stopped/comparison.json").is_file()
    assert ranked([*TRAIN, "--out", "stopped", "--resume"], place).returncode == 0
    routers = {run: load_file(Path(run, "router/router.safetensors")) for run in ("whole", "one", "stopped")}
    assert distance(routers["whole"], routers["stopped"]) == 0
    assert distance(routers["whole"], routers["one"]) < 1e-5
    curves = [EventAccumulator(f"{run}/tensorboard/REINFORCE").Reload().Scalars("rollout/return") for run in routers]
    for points in zip(*curves, strict=True):
        assert len({point.step for point in points}) == 1
        assert [point.value for point in points] == pytest.approx([points[0].value] * 3, abs=1e-4)


@pytest.mark.slow
def test_ranks_with_bad_options_are_refused(place, monkeypatch, capsys):
    for rank, said in ((0, 1), (1, 0)):  # one of them says it
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(SystemExit):
            main(["compare", "--config", "ranks.yaml"])
        line = "duorl: error: compare runs in one process, not under torchrun or accelerate launch"
        assert capsys.readouterr().err.count(line) == said
    (place / "different.py").write_text(
        "import os, sys\nfrom duorl.cli import main\n"
        "main(['train', '--config', 'ranks.yaml', '--seed', os.environ['RANK'], '--out', 'different'])\n"
    )
    done = ranked(["different.py"], place)
    assert done.returncode != 0 and not (place / "different").exists()
    assert "rank 1 was started with seed 1, rank 0 with 0: give all the same options" in done.stderr


LLAMA = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 2, "max_position_embeddings": 64}
PRETRAIN = """
corpus: [text.txt]
device: cpu
vocab_size: 300
window: 32
evaluation_windows: 4
backbone: {model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2}
training: {max_steps: 20, logging_steps: 5, report_to: tensorboard, disable_tqdm: true, gradient_accumulation_steps: 2}
"""


@pytest.mark.slow
def test_stage_1_and_a_conversion_are_shared(place, monkeypatch):
    monkeypatch.chdir(place)
    Path("pretrain.yaml").write_text(PRETRAIN)
    batch = "--training.per_device_train_batch_size"
    common = ["--config", "pretrain.yaml"]
    main(["pretrain", *common, batch, "4", "--out", "alone"])
    done = ranked(["-m", "duorl", "pretrain", *common, batch, "2", "--out", "shared"], place)
    assert done.returncode == 0, done.stderr
    weights = [load_file(Path(run, "model.safetensors")) for run in ("alone", "shared")]
    assert distance(*weights) < 1e-4
    history = [json.loads(Path(run, "history.json").read_text()) for run in ("alone", "shared")]
    for one, other in zip(*history, strict=True):
        assert one.get("loss") == pytest.approx(other.get("loss"), abs=1e-4)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **LLAMA)).save_pretrained("base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        Path("base", name).write_bytes(Path("alone", name).read_bytes())
    convert = [
        "convert",
        "--device",
        "cpu",
        "--model",
        "base",
        "--small_ratio",
        "4",
        "--corpus",
        "text.txt",
        "--window",
        "32",
    ]
    convert += ["--choose.tokens", "512", "--evaluation_windows", "4"]
    for stage in ("regress", "distil"):
        convert += [f"--{stage}.tokens", "1280", f"--{stage}.tokens_per_update", "128"]
    main([*convert, "--out", "alone-small"])
    done = ranked(["-m", "duorl", *convert, "--out", "shared-small"], place)
    assert done.returncode == 0, done.stderr
    for stage in ("choose", "regress", "distil"):
        weights = [load_file(f"{run}-small/stages/{stage}/small.safetensors") for run in ("alone", "shared")]
        assert distance(*weights) < 1e-4, stage
    cards = [Path(f"{run}-small", "README.md").read_text().splitlines() for run in ("alone", "shared")]
    assert len(cards[0]) == len(cards[1])
