"""The command line, as a user types it."""

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
from datasets import load_dataset
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import duorl
from duorl import routers
from duorl.cli import main
from duorl.cli.commands import COMMANDS, in_words
from duorl.cli.console import resume_command
from duorl.cli.learners import LEARNERS, named
from duorl.cli.parser import build_parser, parse
from duorl.learners.base import Learner
from duorl.paper import StudySize, dense, scaling
from duorl.routers import HeadRouter

ROOT = Path(__file__).parent.parent
TINY = """
total_decisions: 20000
validations: 2
env: {windows_per_batch: 1, group_size: 2, window: 32}
evaluation:
  {windows: 4, reference_windows: 1, fixed_windows: 1, finalists: 2, final_windows: 2, batch: 4}
rivals:
  supervised: {class_path: Supervised, init_args: {windows: 1, epochs: 1}}
  soft: {class_path: Soft, init_args: {updates: 2}}
"""


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A configuration that runs in seconds, in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path


def refused(arguments, capsys) -> str:
    """The one line with which a command refuses its input."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("duorl: error: "), lines
    return lines[0]


_COMMAND_OF = {
    "compare": "compare",
    "neighbours": "compare",
    "smollm2": "compare",
    "dense": "dense",
    "pretrain-tiny": "pretrain",
}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_is_valid(path):
    options, text = parse(_COMMAND_OF.get(path.stem, "train"), ["--config", str(path)])
    assert yaml.safe_load(text) and options


def test_the_default_config_is_the_default():
    spelled_out = parse("train", ["--config", str(ROOT / "configs" / "train.yaml")])[1]
    assert yaml.safe_load(spelled_out) == yaml.safe_load(parse("train", [])[1])


@pytest.mark.parametrize(
    ("arguments", "key", "expected"),
    [
        (["--agent", "REINFORCE"], "agent", {"learning_rate": 0.01, "baseline": "leave-one-out"}),
        (["--agent", "Soft"], "agent", {"learning_rate": 0.01, "updates": 120}),
        (["--config", str(ROOT / "configs" / "reinforce.yaml")], "agent", {"learning_rate": 0.01}),
        (["--agent", "REINFORCE", "--agent.learning_rate", "0.5"], "agent", {"learning_rate": 0.5}),
        (["--agent.learning_rate", "0.5"], "agent", {"learning_rate": 0.5, "epochs": 2}),
        (["--reward", "dear.Dear"], "reward", {"price": 7.0}),
        (["--reward", "dear.Dear", "--reward.price", "3"], "reward", {"price": 3.0}),
        (["--config", "dear.yaml"], "reward", {"price": 5.0}),
        (["--reward.price", "0.2"], "reward", {"price": 0.2}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_class_named_by_the_user_keeps_its_own_defaults(arguments, key, expected, tiny):
    (tiny / "dear.py").write_text(
        "import duorl.rewards\n"
        "class Dear(duorl.rewards.Reward):\n"
        "    def __init__(self, price: float = 7.0):\n"
        "        self.price = price\n"
    )
    (tiny / "dear.yaml").write_text("reward: {class_path: dear.Dear, init_args: {price: 5.0}}\n")
    text = parse("train", arguments)[1]
    assert expected.items() <= yaml.safe_load(text)[key]["init_args"].items()


def test_a_function_is_a_reward(tiny):
    (tiny / "plain.py").write_text("def thrifty(step):\n    return -step.compute\n")
    options, text = parse("train", ["--reward", "plain.thrifty"])
    assert yaml.safe_load(text)["reward"] == "plain.thrifty" and options.reward.__name__ == "thrifty"
    (tiny / "again.yaml").write_text(text)
    assert parse("train", ["--config", "again.yaml"])[1] == text


def test_learners_are_found_by_name():
    for name in LEARNERS:
        assert issubclass(named(name.lower()), Learner) and named(name).__name__ == name
    with pytest.raises(ValueError, match="unknown learner 'nobody': choose from PPO"):
        named("nobody")
    with pytest.raises(ValueError, match=r"json\.JSONDecoder is not a Learner"):
        named("json.JSONDecoder")


def test_lists_need_no_brackets_and_learners_no_capitals():
    short = ["--actions", "big,small", "--rivals=soft,KNN", "--env.prices", "0.1,1", "--agent", "reinforce"]
    whole = ["--actions", "[big, small]", "--rivals=[soft, KNN]", "--env.prices", "[0.1, 1]", "--agent", "REINFORCE"]
    assert parse("train", short)[1] == parse("train", whole)[1]
    assert yaml.safe_load(parse("compare", ["--targets", "0.5"])[1])["targets"] == [0.5]
    for flag in (["--learned_on", "a,b.txt"], ["--learned_on=a,b.txt"]):  # a text is one name
        assert parse("evaluate", ["--router", "r", *flag])[0].learned_on == "a,b.txt"


def test_compare_has_learners_by_default(capsys):
    options, text = parse("compare", ["--seeds", "2"])
    assert list(options.agents) == ["PPO", "REINFORCE"]
    given = yaml.safe_load(text)["agents"]["PPO"]["init_args"]
    assert given == yaml.safe_load(parse("train", [])[1])["agent"]["init_args"]
    assert list(parse("compare", ["--agents", "{A: DQN}"])[0].agents) == ["A"]


@pytest.mark.parametrize("option", ["agent", "reward"])
def test_help_without_a_class_is_about_the_default_one(option, capsys):
    with pytest.raises(SystemExit):
        parse("train", [f"--{option}.help"])
    expected = {"agent": "--agent.clip_range", "reward": "--reward.price"}
    assert expected[option] in capsys.readouterr().out


@pytest.mark.slow
def test_what_nobody_reads_or_a_terminal_cannot_show_is_no_error():
    duorl = [sys.executable, "-m", "duorl"]
    closed = subprocess.run(f"{shlex.join(duorl)} train --help | true", shell=True, capture_output=True, text=True)
    assert closed.stderr == ""
    plain = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    words = [*duorl, "generate", "--prompt", "\N{SNOWMAN}", "--max_new_tokens", "2", "--router", "small"]
    shown = subprocess.run([*words, "--show", "routes"], capture_output=True, text=True, env=plain)
    assert shown.returncode == 0 and re.search(r"^s{8} 0\.06 ", shown.stdout, re.MULTILINE)


def test_rivals_are_names_or_learners_with_options():
    options, text = parse("train", ["--rivals", "[]"])
    assert options.rivals == []
    options, text = parse("train", ["--rivals", "{wide: {class_path: Supervised, init_args: {width: 7}}, KNN: KNN}"])
    assert yaml.safe_load(text)["rivals"]["wide"]["init_args"]["width"] == 7 and list(options.rivals) == ["wide", "KNN"]


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


def test_the_quick_study_changes_defaults_and_no_option_that_was_given(tmp_path):
    given = tmp_path / "paper.yaml"
    given.write_text("total_decisions: 3000")
    words = ["--quick", "--size.prices", "[0.7]", "--config", str(given)]
    options, config = parse("paper", words)
    assert (options.size.prices, options.size.windows, options.size.big) == ((0.7,), 8, (1,))
    assert (options.total_decisions, options.soft) == (3000, {"updates": 40})
    assert parse("paper", [])[0].size == StudySize()
    given.write_text("quick: true")
    assert parse("paper", ["--config", str(given)])[0].size.windows == 8
    given.write_text(config)
    again = parse("paper", ["--config", str(given)])[0]
    assert all(again[name] == options[name] for name in ("quick", "size", "soft", "total_decisions"))


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "gone"], "no run in gone"),
        (["report"], "run"),
        (["oracle", "--method", "exhaustive", "--memory_limit", "1000"], "memory_limit 1,000 is too small: .* need"),
        (["oracle", "--price", "-1"], "price must be at least 0"),
        (["oracle", "--shard", "0"], "shard must be at least 1"),
        (["oracle", "--skip", "half"], "half"),
        (["oracle", "--context", "causal"], "causal"),
        (["paper", "--dense", "gone"], "no dense.json at gone"),
        (["paper", "--size.windows", "1"], "windows must be at least 2"),
        (["paper", "--size.prices", "[]"], "prices must be at least one"),
        (["paper", "--size.prices", "[-1.0]"], "each at least 0"),
        (["paper", "--env.window", "4"], "at least 8 tokens"),
        (["dense", "--recipe.out", "x", "--recipe.corpus", "gone.txt"], "no text at 'gone.txt'"),
        (["paper", "--prose", "gone.txt"], "no text at 'gone.txt'"),
        (["dense", "--recipe.out", "x", "--recipe.model", "y"], "trained from scratch"),
        (["dense", "--recipe.out", "x", "--shares", "[2]"], "shares must be in"),
        (["pretrain", "--out", "x", "--trained", "small"], "give the model to start from"),
        (["pretrain", "--out", "x", "--big_share", "2"], "big_share must be in"),
        (["compare", "--agents", "{PPO: PPO}", "--targets", "[0.5]"], "give env.prices"),
        (["compare", "--agents", "{PPO: PPO}", "--env.prices", "[0.1, 1]", "--targets", "[2]"], "between 0 and 1"),
        (["compare", "--agents", "{soft: PPO}"], "cannot be called 'soft'"),
        (["compare", "--agents", "{lower bound: PPO}"], "cannot be called 'lower bound'"),
        (["compare", "--agents", "{PPO: PPO}", "--rivals", "[nobody]"], "unknown learner 'nobody'"),
        (["compare", "--agents", "{PPO: PPO}", "--own_env", "{A2C: {}}"], "'A2C', which is not among the learners"),
        (["compare", "--agents", "{PPO: PPO}", "--starts", "{soft: PPO}"], "'soft' cannot start from 'PPO', only from"),
        (["compare", "--agents", "{PPO: PPO}", "--starts", "{PPO: A2C}"], "order: supervised, soft, PPO"),
        (["compare", "--agents", "{KNN: KNN}", "--starts", "{KNN: soft}"], "KNN cannot start from a router"),
        (["trian"], r"unknown command 'trian' \(did you mean train\?\)"),
        ([], "no command"),
        (["compare", "--agents", "{PPO: PPO}", "--own_env", "{PPO: {copies: 2}}"], "copies"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_other_commands_refuse_bad_input_too(arguments, message, tiny, capsys):
    before = sorted(tiny.rglob("*"))
    assert re.search(message, refused(arguments, capsys))
    assert sorted(tiny.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--total_decision", "3"], "did you mean total_decisions"),
        (["--learning_rate", "3"], r"did you mean agent\.learning_rate\?"),
        (["--price", "3"], r"did you mean reward\.price\?"),
        (["--windows_per_batch", "3"], r"did you mean env\.windows_per_batch\?"),
        (["--wandb", "x"], r"unrecognized arguments: --wandb x \(see --help\)"),
        (["--agent", "ppoo"], 'option "agent": there is no class ppoo .choose from PPO'),
        (["--model", "duo_tiny"], r"no model 'duo_tiny': did you mean duo-tiny\?"),
        (["--agent.init", "has_one"], r"no router in has_one: there is one in has_one/routers/soft"),
        (["--agent.learnin_rate", "3"], "did you mean learning_rate"),
        (["--config", "wrong.yaml"], "'total_decison'.*did you mean total_decisions"),
        (["--config", "gone.yaml"], "gone.yaml"),
        (["--agent", "FOO"], "choose from PPO, A2C, MaskablePPO, REINFORCE"),
        (["--env.prices", "[0.5, 0.1]"], "prices must be the lowest and the highest"),
        (["--env.prices", "[0.5, 1.0]"], r"price 0\.3 is not among env\.prices"),
        (["--target_compute", "1.5"], "target_compute must be between 0 and 1"),
        (["--env.big_layers", "3"], "use MaskablePPO"),
        (["--agent", "MaskablePPO", "--env.big_layers", "9"], "big_layers must be in 0 to 8"),
        (["--agent.init", "nowhere"], "no router in nowhere"),
        (["--reward", "bare.Bare", "--env.prices", "[0.1, 1.0]"], "is not among env.prices"),
        (["--reward", "bare.Bare", "--target_compute", "0.5"], "no prices"),
        (["--seed", "x"], 'option "seed": must be a whole number, not x'),
        (["--env.context", "near"], 'option "env.context": choose from routed, reference, not near'),
        (["--corpus", '["gone.txt"]'], "no text at 'gone.txt'"),
        (["--corpus", '["zero.txt"]'], "zero.txt is empty"),
        (["--corpus", '["short.txt"]'], r"128 \+ 1"),
        (["--reward", "gone.Gone"], "No module named 'gone'"),
        (["--reward", "json.JSONDecoder"], "not correspond to a subclass of Reward"),
        (["--reward.price", "-1"], "price must be at least 0"),
        (["--actions", '["small", "huge"]'], "unknown action 'huge'"),
        (["--model", "nowhere"], "no model 'nowhere'.*duo-tiny"),
        (["--model", "empty"], "lacks config.json, model.safetensors, tokenizer.json"),
        (["--out", "full"], "full already holds files: give --overwrite"),
        (["--out", "full", "--overwrite"], "no run"),
        (["--out", "fresh", "--resume"], "nothing to resume"),
        (["--agent", "REINFORCE", "--env.group_size", "1"], "group_size to at least 2"),
        (["--evaluation.windows", "0"], "windows must be at least 1, not 0"),
        (["--total_decisions", "0"], "total_decisions must be at least 1"),
        (["--env.token_discount", "1"], r"token_discount must be in \[0, 1\)"),
        (["--env.windows_per_batch", "9999"], "a batch takes 9999"),
        (["--reference", "huge"], "unknown action 'huge'"),
        (
            ["--evaluation.windows", "8", "--evaluation.reference_windows", "16"],
            "reference_windows 16 must be among the 8",
        ),
        (["--env.inputs", "[nothing]"], "nothing"),
        (["--save_every", "x"], "save_every"),
        (["--agent.width", "-1"], "width must be at least 0"),
        (["--agent.batch_size", "1"], "batch_size"),
        (["--reward", "scalar.Scalar"], "Scalar must return one reward per token"),
        (["--out", "other", "--overwrite"], "holds files but no run"),
        (["--out", "ours", "--overwrite", "--resume"], "give one of them"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_leaves_nothing(arguments, message, tiny, small_corpus, capsys):
    (tiny / "zero.txt").touch()
    (tiny / "short.txt").write_text("short")
    (tiny / "wrong.yaml").write_text("total_decison: 3\n")
    (tiny / "empty").mkdir()
    (tiny / "full").mkdir()
    (tiny / "full" / "precious").touch()
    (tiny / "other").mkdir()
    (tiny / "other" / "config.yaml").touch()  # another program's
    HeadRouter(8, 192).save_pretrained(tiny / "has_one" / "routers" / "soft")
    (tiny / "ours").mkdir()
    (tiny / "ours" / ".duorl").touch()
    (tiny / "ours" / "config.yaml").touch()
    reward = (
        "import duorl.rewards\nclass Scalar(duorl.rewards.Reward):\n    def __call__(self, step):\n        return 1.0\n"
    )
    (tiny / "scalar.py").write_text(reward)
    (tiny / "bare.py").write_text(reward.replace("Scalar", "Bare").replace("1.0", "step.compute"))
    before = sorted(tiny.rglob("*"))
    text = [] if "--corpus" in arguments else ["--corpus", small_corpus]
    assert re.search(message, refused(["train", *text, *arguments], capsys))
    assert sorted(path for path in tiny.rglob("*") if "__pycache__" not in path.parts) == before


def test_errors_are_told_without_the_names_of_classes_and_numbers(tiny, capsys):
    assert refused(["train", "--model", "nowhere"], capsys).startswith("duorl: error: no model 'nowhere': give")
    said = {"No such file or directory: gone.txt": FileNotFoundError(2, "No such file or directory", "gone.txt")}
    said |= {"no file here": FileNotFoundError("no file here"), "KeyError: 'x'": KeyError("x")}
    assert {words: in_words(error) for words, error in said.items()} == {words: words for words in said}


def test_help_names_the_rewards(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    section = capsys.readouterr().out.split("\nrewards:\n")[1]
    for line in ("LossImprovement(price=0.1)", "TeacherKL(price=0.1, share=1.0)", "RedundancyCharge(charge=0.01"):
        assert f"\n  {line}" in section
    assert "--reward thrifty.Thrifty --reward.bonus 0.02" in section


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_option(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0 and COMMANDS[command].summary.split()[0] in capsys.readouterr().out
    actions = build_parser(command)._actions
    assert not [action.dest for action in actions if action.option_strings and not action.help]


def test_the_top_answers_from_its_table(capsys):
    for words in (["--help"], ["-h"], ["--version"]):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert all(command.summary in printed for command in COMMANDS.values()) and "duorl 0." in printed


_HEAVY = ("transformers", "datasets", "sklearn", "matplotlib", "plotly", "torch")


@pytest.mark.parametrize(
    ("words", "allowed"),
    [(["--help"], 0), (["--version"], 0), (["trian"], 0), (["train", "--help"], 1), (["train", "--agnet", "X"], 1)],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_need_not_be_imported_is_not(words, allowed):
    """Heavy packages, the last `allowed` of them apart."""
    names = _HEAVY[: len(_HEAVY) - allowed]
    code = (
        "import sys\nfrom duorl.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {names} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"


OWN_FOLDER = """
import sys
import duorl.cli
import duorl.agents
from duorl.cli.parser import parse
assert duorl.agents.PPO.__name__ == "PPO"
options, text = parse("compare", ["--agents", "{PPO: PPO}", "--reward", "rewards.Mine"])
assert sys.path[-1].endswith("own") and not sys.path[0].endswith("own"), sys.path
import agents
assert agents.__file__.endswith("own/agents/__init__.py")
print(type(options.reward).__name__)
"""


def test_folders_of_the_users_own_stand_in_for_nothing(tmp_path):
    own = tmp_path / "own"
    for name in ("agents", "envs", "tests", "configs", "rewards"):
        (own / name).mkdir(parents=True)
        (own / name / "__init__.py").touch()
    (own / "rewards" / "__init__.py").write_text("import duorl.rewards\nclass Mine(duorl.rewards.Reward):\n    pass\n")
    (tmp_path / "script.py").write_text(OWN_FOLDER)
    done = subprocess.run([sys.executable, "../script.py"], cwd=own, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "Mine", done.stderr[-2000:]


RESUMED = [
    (["--out", "here"], "duorl train --out here --resume"),
    (["--out=a b", "--overwrite"], "duorl train '--out=a b' --resume"),
    ([], "duorl train --out runs/ppo-1 --resume"),
]


@pytest.mark.parametrize(
    ("typed", "line"), RESUMED, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_the_line_that_goes_on_with_a_run(typed, line, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/bin/duorl", "train", *typed])
    assert resume_command(Path("runs/ppo-1")) == line


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
