"""The commands, as a user types them, from the first checks to the files they leave."""

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import TINY, refused
from datasets import load_dataset
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import duorl
from duorl import routers
from duorl.cli import main
from duorl.paper import dense, scaling

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_what_nobody_reads_or_a_terminal_cannot_show_is_no_error():
    duorl = [sys.executable, "-m", "duorl"]
    closed = subprocess.run(f"{shlex.join(duorl)} train --help | true", shell=True, capture_output=True, text=True)
    assert closed.stderr == ""
    plain = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    words = [*duorl, "generate", "--prompt", "\N{SNOWMAN}", "--max_new_tokens", "2", "--router", "small"]
    shown = subprocess.run([*words, "--show", "routes"], capture_output=True, text=True, env=plain)
    assert shown.returncode == 0 and re.search(r"^s{8} 0\.06 ", shown.stdout, re.MULTILINE)


@pytest.mark.slow
def test_train_writes_the_whole_run_folder(tiny, capsys):
    main(["train", "--config", "tiny.yaml", "--out", "here", "--seed", "3"])
    printed = capsys.readouterr().out
    assert "--logdir here/tensorboard" in printed and "best fixed" in printed
    saved = json.loads(Path("here/comparison.json").read_text())
    names = [row["router"] for row in saved["rows"]]
    fixed = ["random", "all-skip", "all-small", "all-big", "best fixed", "fixed mix", "supervised", "soft"]
    assert names == [*fixed, "PPO", "oracle"]
    assert Path("here/figures/frontier.png").stat().st_size > 10_000
    assert yaml.safe_load(Path("here/config.yaml").read_text())["seed"] == 3
    router, row = routers.load("here/router"), saved["rows"][-2]
    assert isinstance(router, routers.HeadRouter) and "# PPO" in Path("here/router/README.md").read_text()
    assert router.facts["measured on held-out text"][0].items() <= row.items() and row["router"] == "PPO"

    events = EventAccumulator("here/tensorboard/PPO", size_guidance={"tensors": 0}).Reload()
    tags = set(events.Tags()["scalars"])
    assert {f"rollout/{name}" for name in ("return", "gain", "compute", "loss")} <= tags
    assert {f"validation/{name}" for name in ("return", "gain", "compute", "loss")} <= tags
    assert {"train/entropy", "train/explained_variance", "actions_big/layer_7", "actions_skip/layer_0"} <= tags
    assert {path.name for path in Path("here/tensorboard").iterdir()} == {"PPO", "supervised", "soft"}
    assert events.Tags()["images"] == ["routes/share_of_big"]
    curve = events.Scalars("rollout/return")
    assert [point.step for point in curve] == [8 * 2 * 32 * k for k in range(1, len(curve) + 1)]
    assert curve[-1].step >= 20_000

    # the saved router deploys, and another evaluation of it gives the run's own numbers
    evaluation = yaml.safe_load(TINY)["evaluation"]
    flags = [f"--evaluation.{name}={value}" for name, value in evaluation.items()]
    flags += ["--evaluation.bound=exhaustive", "--evaluation.baseline=enumeration"]
    main(["evaluate", "--router", str(Path("here/router").absolute()), "--window=32", "--out", "again", *flags])
    again = json.loads(Path("again/comparison.json").read_text())["rows"]
    expected = next(row for row in saved["rows"] if row["router"] == "PPO")
    assert again[0]["router"] == "here/router"
    for key in ("loss", "compute", "return", "regret", "actions"):
        assert again[0][key] == pytest.approx(expected[key]), key


COMPARE = """
agents: {PPO: PPO, REINFORCE: REINFORCE, ReinMax: {class_path: ReinMax, init_args: {learning_rate: 1.0e-9}}}
starts: {ReinMax: soft}
own_env: {ReinMax: {group_size: 1, windows_per_batch: 2}, soft: {windows_per_batch: 2}}
env: {windows_per_batch: 1, group_size: 2, window: 16, prices: [0.02, 0.8]}
total_decisions: 1500
seeds: 2
targets: [0.3, 0.5]
knowable: 8
rivals:
  supervised: {class_path: Supervised, init_args: {windows: 1, epochs: 1}}
  soft: {class_path: Soft, init_args: {updates: 2}}
"""


@pytest.mark.slow
def test_compare_trains_every_seed_and_resumes(tiny, small_corpus, capsys):
    Path("compare.yaml").write_text(COMPARE)
    for name in ("second.txt", "other.txt"):
        Path(name).write_text(Path(small_corpus).read_text())
    corpus = json.dumps([small_corpus, "second.txt"])
    configs = ["--config", "tiny.yaml", "--config", "compare.yaml", "--corpus", corpus]
    arguments = ["compare", *configs, "--transfer", '["other.txt"]', "--out", "all"]
    main(arguments)
    first = json.loads(Path("all/comparison.json").read_text())
    learned = ["supervised", "soft", "PPO", "REINFORCE", "ReinMax"]
    assert [row["router"] for row in first["rows"]][5:-1] == learned
    assert [row["seeds"] for row in first["rows"]] == [1] * 5 + [2] * 5 + [1]
    split = {row["router"]: row["regret"] - row["regret_avoidable"] for row in first["rows"]}
    assert list(split.values()) == pytest.approx([split["oracle"]] * len(split), abs=1e-5)  # what the label alone tells
    assert set(Path("all/tensorboard").glob("*/*")) == {
        Path("all/tensorboard", name, f"seed-{seed}") for name in learned for seed in (0, 1)
    }
    budgets = json.loads(Path("all/budgets.json").read_text())
    found, second, other = budgets["texts"].values()
    assert [text["transfer"]["learned"] for text in (found, second, other)] == [True, True, False]
    assert [row["target"] for row in other["transfer"]["rows"]] == [0.3] * 6 + [0.5] * 6
    assert (
        Path("all/figures/budgets-other.txt.png").is_file() and "not learned on" in Path("all/budgets.md").read_text()
    )
    assert len(found["rows"]) == 2 * 6 and len(found["routers"]) == 6
    assert {row["target"] for row in found["rows"]} == {0.3, 0.5}
    assert "best fixed" in Path("all/budgets.md").read_text()
    start, end = (load_file(f"all/routers/{name}/seed-1/router.safetensors") for name in ("soft", "ReinMax"))
    assert all(torch.allclose(start[name], end[name], atol=1e-6) for name in start)
    weights = Path("all/routers/PPO/seed-1/router.safetensors").read_bytes()
    for left in ("REINFORCE/seed-0/result.json", "ReinMax/seed-1/ladder/result.json"):
        Path("all/routers", left).unlink()
    kept = [*Path("all/routers/ReinMax/seed-1").glob("ladder-*"), *Path("all/fixed").glob("ladder-*")]
    measured = {path: path.stat().st_mtime_ns for path in [*kept, Path("all/fixed/result.json")]}
    capsys.readouterr()
    main([*arguments, "--resume"])
    assert len(measured) == 7 and all(path.stat().st_mtime_ns == when for path, when in measured.items())
    assert Path("all/routers/PPO/seed-1/router.safetensors").read_bytes() == weights
    assert "made with seed 0, not 1" in refused([*arguments, "--resume", "--seed", "1"], capsys)
    again = json.loads(Path("all/comparison.json").read_text())
    for before, after in zip(first["rows"], again["rows"], strict=True):
        assert before["loss"] == after["loss"] and before["return_interval"] == after["return_interval"]
    texts = json.loads(Path("all/budgets.json").read_text())["texts"]
    for row in (row for numbers in (texts, budgets["texts"]) for one in numbers.values() for row in one["rows"]):
        del row["tokens_per_second"], row["tokens_per_second_interval"]  # measured anew
    assert texts == budgets["texts"]


@pytest.mark.slow
def test_train_to_a_target_and_to_a_hard_budget(tiny, small_corpus):
    Path("learned.txt").write_text(Path(small_corpus).read_text()[-300_000:])
    usual = ["train", "--config", "tiny.yaml", "--corpus", "learned.txt", "--rivals", "[]"]
    main([*usual, "--total_decisions", "5000", "--target_compute", "0.5", "--out", "soft"])
    rows = {row["router"]: row for row in json.loads(Path("soft/comparison.json").read_text())["rows"]}
    settings = json.loads(Path("soft/comparison.json").read_text())["settings"]
    events = EventAccumulator("soft/tensorboard/PPO").Reload().Scalars("train/price")
    assert events[-1].value == pytest.approx(settings["price"]) and rows["PPO"]["compute"] == pytest.approx(
        0.5, abs=0.1
    )
    budget = ["--agent", "MaskablePPO", "--env.big_layers", "3", "--total_decisions", "2000", "--out", "hard"]
    main([*usual, *budget])
    rows = {row["router"]: row for row in json.loads(Path("hard/comparison.json").read_text())["rows"]}
    assert rows["MaskablePPO"]["actions"]["big"] == pytest.approx(3 / 8)
    priced = ["--env.prices", "[0.02, 0.8]", "--total_decisions", "2000", "--out", "priced"]
    main([*usual, *priced])
    few = ["--evaluation.windows=2", "--evaluation.reference_windows=1", "--evaluation.fixed_windows=1"]
    few += ["--evaluation.finalists=2", "--evaluation.final_windows=2"]
    text = ["--corpus", small_corpus, "--window=64"]
    main(["evaluate", "--router", "priced/router", "--price=0.1", *text, *few, "--out=one"])
    assert json.loads(Path("one/comparison.json").read_text())["settings"]["price"] == 0.1
    more = [
        "--evaluation.fixed_windows=2",
        "--evaluation.bound=none",
        "--target_compute=0.6",
        "--learned_on",
        "learned.txt",
        "--out=two",
    ]
    main(["evaluate", "--router", "priced/router", *text, *few, *more])
    found = json.loads(Path("two/comparison.json").read_text())
    rows, calibration = {row["router"]: row for row in found["rows"]}, found["settings"]["calibration"]
    assert calibration["compute"] == pytest.approx(0.6, abs=0.01) and calibration["windows"] == 2
    assert rows["priced/router at 0.6"]["compute"] == pytest.approx(0.6, abs=0.15)
    assert 0.06 < rows["fixed mix at 0.6"]["compute"] <= 1 and "fixed mix" in rows  # two windows, so a draw of two
    old, new = rows["priced/router"]["learned_on"], rows["priced/router"]["compute"]
    assert old["text"] == "learned.txt" and old["drift"] == pytest.approx(new - old["compute"])
    assert "which it learned on" in Path("two/comparison.md").read_text()
    assert "without labels" in Path("two/report.html").read_text()


@pytest.mark.slow
def test_a_users_reward_outside_the_repository_changes_training(tiny):
    """From the command line alone: a bonus for small ends in a router that only takes small."""
    (tiny / "mine.py").write_text(
        "import duorl.rewards\n"
        "class Thrifty(duorl.rewards.Reward):\n"
        "    def __init__(self, bonus: float = 0.0):\n"
        "        self.bonus = bonus\n"
        "    def __call__(self, step):\n"
        "        return self.bonus * (step.action == 1).float()\n"
    )
    command = [sys.executable, str(ROOT / "train.py"), "--config", "tiny.yaml", "--total_decisions", "60000"]
    options = ["--reward", "mine.Thrifty", "--reward.bonus", "1.0", "--out", "run"]
    subprocess.run([*command, *options], check=True, capture_output=True)
    rows = json.loads(Path("run/comparison.json").read_text())["rows"]
    assert next(row for row in rows if row["router"] == "PPO")["actions"]["small"] > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("context", ["reference", "routed"])
def test_oracle_command(tiny, context):
    main(["oracle", "--windows", "1", "--window", "16", "--context", context, "--out", "found"])
    found = json.loads(Path("found/oracle.json").read_text())
    assert bool(found["rows"]) == (context == "reference")
    rows = list(csv.DictReader(Path("found/tokens.csv").read_text().splitlines(keepends=True)))
    again = load_dataset("parquet", data_files="found/tokens.parquet", split="train", cache_dir="cache")
    assert [row["token"] for row in rows] == again["token"] and len(rows) == 16
    mean = sum(float(row["oracle"]) for row in rows) / 16
    assert mean == pytest.approx(found["oracle"], abs=1e-5)
    for row in rows:
        assert float(row["difficulty"]) == pytest.approx(float(row["all_small"]) - float(row["oracle"]), abs=1e-5)
        assert len(row["route"]) == 8 and set(row["route"]) <= set("sB")
    assert Path("found/difficulty.html").read_text().count("title='all-small") == 2 * 16
    assert [row["big"] for row in found["rows"]] == (list(range(9)) if context == "reference" else [])
    assert found["oracle"] <= found["best_of_100_random"]
    for row in found["rows"]:
        assert found["oracle"] <= row["loss"] <= row["fixed_loss"] + 1e-6


PAPER = """
total_decisions: 2000
env: {windows_per_batch: 1, group_size: 2, window: 8}
soft: {updates: 1}
soft_windows: 1
size: {windows: 2, pattern_windows: 1, random_patterns: 5, big: [1], prices: [0.3]}
"""


@pytest.mark.slow
def test_paper_writes_every_figure_its_numbers_the_claims_and_a_report(tiny, small_corpus, capsys):
    Path("paper.yaml").write_text(PAPER)
    main(["paper", "--config", "paper.yaml", "--prose", small_corpus, "--code", small_corpus, "--out", "study"])
    names = {f"{number}{letter}" for number in "23" for letter in "abcd"} | {"4a", "4b", "4c", "5", "6", "7"}
    for ending in ("png", "json"):
        assert {path.stem for path in Path("study").glob(f"figure-*.{ending}")} == {f"figure-{name}" for name in names}
    curves = json.loads(Path("study/figure-4b.json").read_text())["texts"]
    assert set(curves) == {"prose", "code"} and set(curves["code"]["routed"]) == {
        "oracle", "fixed", "soft", "PPO", "REINFORCE",
    }  # fmt: skip
    claims = Path("study/claims.md").read_text()
    assert "duo-tiny" in claims and "the oracle's loss is a U" in claims
    table = re.search("<table id='claims'>.*?</table>", Path("study/report.html").read_text(), re.DOTALL)[0]
    Path("study/report.html").unlink()
    capsys.readouterr()
    main(["report", "study"])
    assert "study/report.html" in capsys.readouterr().out and table in Path("study/report.html").read_text()
    Path("study/figure-4b.json").unlink()
    assert "lacks figure-4b.json" in refused(["report", "study"], capsys)


@pytest.mark.slow
def test_a_dense_study_resumes_and_feeds_the_papers_figure_8(tiny, small_corpus, capsys):
    recipe = (
        f"texts: [{small_corpus}]\nshares: [0.0, 1.0]\nwindows: 4\nrecipe: {{out: unused, corpus: [{small_corpus}], "
        "vocab_size: 300, window: 32, evaluation_windows: 4, backbone: "
        "{model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2}, "
        "training: {max_steps: 2, per_device_train_batch_size: 2, report_to: none, disable_tqdm: true}}\n"
    )
    Path("dense.yaml").write_text(recipe)
    main(["dense", "--config", "dense.yaml", "--out", "dense"])
    kept = json.loads(Path("dense/dense.json").read_text())
    assert len(kept["rows"]) == 6 and kept["settings"]["recipe"]["vocab_size"] == 300
    weights = Path("dense/duo/model.safetensors").read_bytes()
    main(["dense", "--config", "dense.yaml", "--out", "dense", "--resume"])
    assert Path("dense/duo/model.safetensors").read_bytes() == weights
    other = ["dense", "--config", "dense.yaml", "--out", "dense", "--resume", "--recipe.seed", "7"]
    assert "made with recipe.seed 0, not 7" in refused(other, capsys)
    assert "says nothing of stdlib-" in refused(["paper", "--dense", "dense"], capsys)
    rows = dense.find("dense", Path("gone"), [small_corpus])
    assert list(scaling(rows, {"prose": small_corpus, "code": "stdlib-code"})) == ["8a", "8c"]
    assert scaling(rows, {"code": "stdlib-code"}) == {}


@pytest.mark.slow
def test_the_quick_dense_study_measures_what_figure_8_needs(tmp_path, small_corpus):
    figures = scaling(dense.quick(tmp_path, {"prose": [small_corpus]}, seed=0), {"prose": small_corpus})
    assert [len(points) for points in figures["8a"]["texts"]["prose"].values()] == [3, 3]
    assert [len(points) for points in figures["8c"]["texts"]["prose"].values()] == [3, 3]


@pytest.mark.slow
def test_pretrain_makes_a_model_that_loads_and_resumes(tiny, small_corpus):
    backbone = (
        "{model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2}"
    )
    training = "{max_steps: 4, per_device_train_batch_size: 2, save_steps: 2, report_to: none, disable_tqdm: true}"
    sizes = "vocab_size: 300\nwindow: 32"
    text = f"out: model\ncorpus: [{small_corpus}]\n{sizes}\nbackbone: {backbone}\ntraining: {training}\n"
    Path("stage1.yaml").write_text(text)
    main(["pretrain", "--config", "stage1.yaml"])
    model, tokenizer = duorl.load("model"), duorl.load_tokenizer("model")
    assert model.num_layers == 2 and tokenizer.decode(tokenizer("def f():")["input_ids"]) == "def f():"
    history = json.loads(Path("model/history.json").read_text())
    assert {"eval_all_small", "eval_all_big"} <= set(history[-1])
    (Path("model") / "result.json").unlink()
    (Path("model/checkpoints/checkpoint-4/trainer_state.json")).unlink()  # a checkpoint that was half written
    weights = Path("model/model.safetensors").read_bytes()
    main(["pretrain", "--config", "stage1.yaml", "--resume"])
    assert Path("model/model.safetensors").read_bytes() == weights
    assert [entry["step"] for entry in json.loads(Path("model/history.json").read_text())][-1] == 4


@pytest.mark.slow
def test_a_failed_job_is_named_and_resume_does_the_rest(tiny, small_corpus, capsys):
    (tiny / "fails.py").write_text(
        "import pathlib\nfrom duorl.learners import Soft\n"
        "class Fails(Soft):\n"
        "    def update(self):\n"
        "        if pathlib.Path('broken').exists():\n"
        "            raise RuntimeError('it is broken')\n"
        "        return super().update()\n"
    )
    Path("broken").touch()
    rivals = "{bad: {class_path: fails.Fails, init_args: {updates: 2}}}"
    usual = ["train", "--config", "tiny.yaml", "--corpus", small_corpus, "--total_decisions", "1000", "--out", "run"]
    with pytest.raises(SystemExit) as stopped:
        main([*usual, "--rivals", rivals])
    said = capsys.readouterr()
    assert stopped.value.code == 1 and "bad failed: RuntimeError: it is broken" in said.out
    assert "1 of 2 jobs are not finished: bad; go on with" in said.err and said.err.strip().endswith("--resume")
    assert "in update" in Path("run/errors/bad.txt").read_text()
    weights = Path("run/router/router.safetensors").read_bytes()
    Path("broken").unlink()
    main([*usual, "--rivals", rivals, "--resume"])
    assert Path("run/router/router.safetensors").read_bytes() == weights
    rows = [row["router"] for row in json.loads(Path("run/comparison.json").read_text())["rows"]]
    assert {"bad", "PPO"} <= set(rows) and not any(Path("run/errors").iterdir())
