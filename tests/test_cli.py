"""The command line, as a user types it."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from datasets import load_dataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import duorl
from duorl import cli, dense, routers
from duorl.cli import build_parser, main
from duorl.paper import scaling

ROOT = Path(__file__).parent.parent
TINY = """
total_decisions: 20000
validations: 2
env: {windows_per_batch: 1, group_size: 2, window: 64}
evaluation:
  {windows: 4, reference_windows: 1, fixed_windows: 1, finalists: 2, final_windows: 2, batch: 4, resamples: 50}
supervised: {windows: 1, epochs: 1}
soft: {updates: 2, windows_per_batch: 1}
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


_COMMAND_OF = {"compare": "compare", "neighbours": "compare", "dense": "dense", "pretrain-tiny": "pretrain"}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_is_valid(path):
    command = _COMMAND_OF.get(path.stem, "train")
    parser, _ = build_parser()
    assert parser.parse_args([command, "--config", str(path)]).subcommand == command


def test_the_default_config_is_the_default():
    parser, subparsers = build_parser()
    spelled_out = parser.parse_args(["train", "--config", str(ROOT / "configs" / "train.yaml")]).train
    default = parser.parse_args(["train"]).train
    assert subparsers["train"].dump(spelled_out) == subparsers["train"].dump(default)


@pytest.mark.parametrize(
    ("arguments", "key", "expected"),
    [
        (["--agent", "REINFORCE"], "agent", {"learning_rate": 0.01, "baseline": "leave-one-out"}),
        (["--config", str(ROOT / "configs" / "reinforce.yaml")], "agent", {"learning_rate": 0.01}),
        (["--agent", "REINFORCE", "--agent.learning_rate", "0.5"], "agent", {"learning_rate": 0.5}),
        (["--agent.learning_rate", "0.5"], "agent", {"learning_rate": 0.5, "epochs": 2}),
        (["--reward", "dear.Dear"], "reward", {"price": 7.0}),
        (["--reward.price", "0.2"], "reward", {"price": 0.2}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_class_named_by_the_user_keeps_its_own_defaults(arguments, key, expected, tiny, monkeypatch):
    (tiny / "dear.py").write_text(
        "import duorl.rewards\n"
        "class Dear(duorl.rewards.Reward):\n"
        "    def __init__(self, price: float = 7.0):\n"
        "        self.price = price\n"
    )
    seen = {}
    monkeypatch.setitem(
        cli.COMMANDS, "train", lambda options, config: seen.update(yaml.safe_load(config)) or (lambda: 0)
    )
    main(["train", *arguments])
    assert expected.items() <= seen[key]["init_args"].items()


@pytest.mark.slow
def test_train_writes_the_whole_run_folder(tiny, capsys):
    main(["train", "--config", "tiny.yaml", "--out", "here", "--seed", "3"])
    printed = capsys.readouterr().out
    assert "--logdir here/tensorboard" in printed and "best fixed" in printed
    saved = json.loads(Path("here/comparison.json").read_text())
    names = [row["router"] for row in saved["rows"]]
    fixed = ["random", "all-skip", "all-small", "all-big", "best fixed", "supervised", "soft"]
    assert names == [*fixed, "PPO", "oracle"]
    assert Path("here/figures/frontier.png").stat().st_size > 10_000
    assert yaml.safe_load(Path("here/config.yaml").read_text())["seed"] == 3
    assert isinstance(routers.load("here/router"), routers.HeadRouter)

    events = EventAccumulator("here/tensorboard/PPO", size_guidance={"tensors": 0}).Reload()
    tags = set(events.Tags()["scalars"])
    assert {f"rollout/{name}" for name in ("return", "gain", "compute", "loss")} <= tags
    assert {f"validation/{name}" for name in ("return", "gain", "compute", "loss")} <= tags
    assert {"train/entropy", "train/explained_variance", "actions_big/layer_7", "actions_skip/layer_0"} <= tags
    assert events.Tags()["images"] == ["routes/share_of_big"]
    curve = events.Scalars("rollout/return")
    assert [point.step for point in curve] == [8 * 2 * 64 * k for k in range(1, len(curve) + 1)]
    assert curve[-1].step >= 20_000

    # the saved router deploys, and another evaluation of it gives the run's own numbers
    evaluation = yaml.safe_load(TINY)["evaluation"]
    flags = [f"--evaluation.{name}={value}" for name, value in evaluation.items()]
    main(["evaluate", "--router", "here/router", "--window=64", "--out", "again", *flags])
    again = json.loads(Path("again/comparison.json").read_text())["rows"]
    expected = next(row for row in saved["rows"] if row["router"] == "PPO")
    for key in ("loss", "compute", "return", "regret", "actions"):
        assert again[0][key] == pytest.approx(expected[key]), key


COMPARE = """
agents: {PPO: PPO, REINFORCE: REINFORCE, ReinMax: ReinMax}
own_env: {ReinMax: {group_size: 1, windows_per_batch: 2}}
env: {windows_per_batch: 1, group_size: 2, window: 64, prices: [0.02, 0.8]}
total_decisions: 3000
seeds: 2
targets: [0.3, 0.5]
knowable: 8
rivals: [supervised, soft, knn, ensemble]
knn: {windows: 2}
ensemble: {windows: 2, members: 2, epochs: 1}
"""


@pytest.mark.slow
def test_compare_trains_every_seed_and_resumes(tiny, small_corpus, capsys):
    Path("compare.yaml").write_text(COMPARE)
    configs = ["--config", "tiny.yaml", "--config", "compare.yaml", "--corpus", small_corpus]
    arguments = ["compare", *configs, "--out", "all"]
    main(arguments)
    first = json.loads(Path("all/comparison.json").read_text())
    learned = ["supervised", "soft", "knn", "ensemble", "PPO", "REINFORCE", "ReinMax"]
    assert [row["router"] for row in first["rows"]][5:-1] == learned
    assert [row["seeds"] for row in first["rows"]] == [1] * 5 + [2] * 7 + [1]
    split = {row["router"]: row["regret"] - row["regret_avoidable"] for row in first["rows"]}
    assert list(split.values()) == pytest.approx([split["oracle"]] * len(split), abs=1e-5)  # what the label alone tells
    assert set(Path("all/tensorboard").glob("*/*")) == {
        Path("all/tensorboard", name, f"seed-{seed}") for name in learned[4:] for seed in (0, 1)
    }
    budgets = json.loads(Path("all/budgets.json").read_text())
    (found,) = budgets["texts"].values()
    assert len(found["rows"]) == 2 * 8 and len(found["routers"]) == 8
    assert {row["target"] for row in found["rows"]} == {0.3, 0.5}
    assert "best fixed" in Path("all/budgets.md").read_text()
    weights = Path("all/routers/PPO/seed-1/router.safetensors").read_bytes()
    for left in ("REINFORCE/seed-0/router.json", "ReinMax/seed-1/ladder-" + budgets_name(small_corpus)):
        Path("all/routers", left).unlink()
    capsys.readouterr()
    main([*arguments, "--resume"])
    assert Path("all/routers/PPO/seed-1/router.safetensors").read_bytes() == weights
    assert "made with seed 0, not 1" in refused([*arguments, "--resume", "--seed", "1"], capsys)
    again = json.loads(Path("all/comparison.json").read_text())
    for before, after in zip(first["rows"], again["rows"], strict=True):
        assert before["loss"] == after["loss"] and before["return_interval"] == after["return_interval"]
    assert json.loads(Path("all/budgets.json").read_text())["texts"] == budgets["texts"]


def budgets_name(corpus: str) -> str:
    return corpus.replace("/", "_") + ".safetensors"


@pytest.mark.slow
def test_train_to_a_target_and_to_a_hard_budget(tiny, small_corpus):
    usual = ["train", "--config", "tiny.yaml", "--corpus", small_corpus, "--rivals", "[]"]
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
    text = ["--corpus", small_corpus, "--window=64"]
    main(["evaluate", "--router", "priced/router", "--price=0.1", *text, *few, "--out=one"])
    assert json.loads(Path("one/comparison.json").read_text())["settings"]["price"] == 0.1


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
env: {windows_per_batch: 1, group_size: 2, window: 32}
soft: {updates: 1, windows_per_batch: 1}
size: {windows: 2, pattern_windows: 1, random_patterns: 5, big: [1], prices: [0.3], resamples: 50}
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
    Path("stage1.yaml").write_text(text.replace("max_steps: 4", "max_steps: 6"))
    main(["pretrain", "--config", "stage1.yaml", "--resume"])
    assert json.loads(Path("model/history.json").read_text())[-1]["step"] == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "gone"], "no run in gone"),
        (["report"], "run"),
        (["oracle", "--memory_limit", "1000"], "memory_limit 1,000 is too small: .* need"),
        (["oracle", "--price", "-1"], "price must be at least 0"),
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
        (["compare", "--agents", "{PPO: PPO}", "--own_env", "{A2C: {}}"], "'A2C', which is not among the agents"),
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
        (["--agent.learnin_rate", "3"], "did you mean learning_rate"),
        (["--config", "wrong.yaml"], "'total_decison'.*did you mean total_decisions"),
        (["--config", "gone.yaml"], "gone.yaml"),
        (["--agent", "FOO"], "choose from A2C, DQN, MEX, PPO, REINFORCE"),
        (["--env.prices", "[0.5, 0.1]"], "prices must be the lowest and the highest"),
        (["--env.prices", "[0.5, 1.0]"], r"price 0\.3 is not among env\.prices"),
        (["--target_compute", "1.5"], "target_compute must be between 0 and 1"),
        (["--env.big_layers", "3"], "use MaskablePPO"),
        (["--agent", "MaskablePPO", "--env.big_layers", "9"], "big_layers must be in 0 to 8"),
        (["--agent.init", "nowhere"], "no router in nowhere"),
        (["--reward", "bare.Bare", "--env.prices", "[0.1, 1.0]"], "is not among env.prices"),
        (["--reward", "bare.Bare", "--target_compute", "0.5"], "no prices"),
        (["--seed", "x"], "seed.*Got value: x"),
        (["--corpus", '["gone.txt"]'], "no text at 'gone.txt'"),
        (["--corpus", '["zero.txt"]'], "zero.txt is empty"),
        (["--corpus", '["short.txt"]'], "128 \+ 1"),
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
        (["--evaluation.windows", "8"], "reference_windows 16 must be among the 8"),
        (["--agent.width", "-1"], "width must be at least 0"),
        (["--agent.batch_size", "1"], "batch_size"),
        (["--reward", "scalar.Scalar"], "Scalar must return one reward per token"),
        (["--out", "other", "--overwrite"], "holds files but no run"),
        (["--out", "ours", "--overwrite", "--resume"], "give one of them"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_leaves_nothing(arguments, message, tiny, capsys):
    (tiny / "zero.txt").touch()
    (tiny / "short.txt").write_text("short")
    (tiny / "wrong.yaml").write_text("total_decison: 3\n")
    (tiny / "empty").mkdir()
    (tiny / "full").mkdir()
    (tiny / "full" / "precious").touch()
    (tiny / "other").mkdir()
    (tiny / "other" / "config.yaml").touch()  # another program's
    (tiny / "ours").mkdir()
    (tiny / "ours" / ".duorl").touch()
    reward = (
        "import duorl.rewards\nclass Scalar(duorl.rewards.Reward):\n    def __call__(self, step):\n        return 1.0\n"
    )
    (tiny / "scalar.py").write_text(reward)
    (tiny / "bare.py").write_text(reward.replace("Scalar", "Bare").replace("1.0", "step.compute"))
    before = sorted(tiny.rglob("*"))
    assert re.search(message, refused(["train", *arguments], capsys))
    assert sorted(path for path in tiny.rglob("*") if "__pycache__" not in path.parts) == before


def test_help_names_the_rewards(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    section = capsys.readouterr().out.split("\nrewards:\n")[1]
    for line in ("LossImprovement(price=0.1)", "TeacherKL(price=0.1, share=1.0)", "RedundancyCharge(charge=0.01"):
        assert f"\n  {line}" in section
    assert "--reward thrifty.Thrifty --reward.bonus 0.02" in section


def test_help_explains_every_option(capsys):
    for command in cli.COMMANDS:
        with pytest.raises(SystemExit) as stopped:
            main([command, "--help"])
        assert stopped.value.code == 0
        _, subparsers = build_parser()
        unexplained = [
            action.dest
            for action in subparsers[command]._actions
            if action.option_strings and not action.help and action.dest not in ("help",)
        ]
        assert not unexplained, unexplained
