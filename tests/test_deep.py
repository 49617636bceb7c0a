"""A model that is too deep to enumerate, 18 layers, through the whole command line."""

import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

import duorl
from duorl import routers
from duorl.cli import main
from duorl.experiments import comparing

pytestmark = pytest.mark.slow
LAYERS = 18
TINY = """
model: deep
corpus: [{corpus}]
total_decisions: 1500
validations: 1
env: {{windows_per_batch: 1, group_size: 2, window: 16}}
evaluation:
  {{windows: 4, reference_windows: 2, fixed_windows: 2, finalists: 2, final_windows: 2, batch: 4}}
rivals:
  supervised: {{class_path: Supervised, init_args: {{windows: 1, epochs: 1}}}}
  soft: {{class_path: Soft, init_args: {{updates: 2}}}}
"""
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory, small_corpus):
    """A folder with the model and its configuration, in which all commands run: with one thread, for all is tiny."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("place")
        patch.chdir(folder)
        Path("tiny.yaml").write_text(TINY.format(corpus=small_corpus))
        save_model("deep", layers=LAYERS)
        yield folder
    torch.set_num_threads(threads)


def save_model(folder: str, layers: int) -> None:
    """Save a random model with the tokenizer of duo-tiny."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=2048, num_hidden_layers=layers, max_position_embeddings=64, **SIZES)
    original = LlamaForCausalLM(config)
    for parameter in original.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    duorl.convert(original.eval(), small_ratio=4).save_pretrained(folder)
    duorl.load_tokenizer().save_pretrained(folder)


@pytest.fixture
def said_before(monkeypatch):
    """Run a command; what it printed before it searched the first fixed pattern."""

    def run(*words: str) -> str:
        printed, before = io.StringIO(), []

        def search(*arguments, **options):
            before.append(printed.getvalue())
            return comparer(*arguments, **options)

        comparer = comparing.Comparer
        with monkeypatch.context() as patch, redirect_stdout(printed):
            patch.setattr(comparing, "Comparer", search)
            main([*words])
        return before[0]

    return run


def read(run: str) -> tuple[dict, dict]:
    """A run's rows by router, and its frontiers."""
    saved = json.loads(Path(run, "comparison.json").read_text())
    return {row["router"]: row for row in saved["rows"]}, saved["frontiers"]


def assert_bounded_below(run: str, before: str) -> dict:
    """The bound is a lower one and nowhere called an oracle; the methods were said before they started."""
    rows, frontiers = read(run)
    assert "best fixed pattern: greedy, up to" in before and f"of {2**LAYERS:,} patterns" in before
    assert "bound: coordinate descent, a lower bound of the oracle, on 2 windows, about" in before
    assert "too many to enumerate" in before
    assert {row["bound"] for row in rows.values()} == {"lower bound"}
    assert rows["lower bound"]["sees_label"] and "oracle" not in rows
    assert rows["lower bound"]["regret"] == pytest.approx(0, abs=1e-5)
    assert frontiers["oracle"] == [] and [point["big"] for point in frontiers["fixed"]] == list(range(LAYERS + 1))
    assert "regret (at least)" in Path(run, "comparison.md").read_text()
    return rows


def test_train_and_evaluate(said_before):
    before = said_before("train", "--config", "tiny.yaml", "--out", "train")
    rows = assert_bounded_below("train", before)
    assert {"supervised", "soft", "PPO", "best fixed", "random"} <= set(rows)
    assert routers.load("train/router").config["layers"] == LAYERS
    options = yaml.safe_load(Path("tiny.yaml").read_text())
    settings = [f"--evaluation.{name}={value}" for name, value in options["evaluation"].items()]
    where = ["--model=deep", f"--corpus={options['corpus'][0]}", "--window=16"]
    before = said_before("evaluate", "--router", "train/router", *where, *settings, "--out", "evaluate")
    again = assert_bounded_below("evaluate", before)
    assert again["train/router"]["loss"] == pytest.approx(rows["PPO"]["loss"])
    assert again["train/router"]["compute"] == pytest.approx(rows["PPO"]["compute"])


def test_compare_with_two_seeds_and_one_router_for_all_prices(said_before):
    few = ["--seeds", "2", "--processes", "1", "--total_decisions", "1500"]
    few += ["--env.prices", "[0.1, 1.0]", "--targets", "[0.5]"]
    few += ["--rivals", "{knn: {class_path: KNN, init_args: {windows: 1, neighbours: 4, base: small}}}"]
    agents = '{"REINFORCE": "REINFORCE", "Soft": {"class_path": "Soft", "init_args": {"updates": 2}}}'
    before = said_before("compare", "--config", "tiny.yaml", "--agents", agents, *few, "--out", "compare")
    rows = assert_bounded_below("compare", before)
    assert rows["REINFORCE"]["seeds"] == rows["Soft"]["seeds"] == rows["knn"]["seeds"] == 2
    (text,) = json.loads(Path("compare/budgets.json").read_text())["texts"].values()
    fixed = next(row for row in text["routers"] if row["router"] == "best fixed")
    assert len(fixed["frontier"]) == LAYERS + 1
    for seed in (0, 1):
        assert routers.load(f"compare/routers/REINFORCE/seed-{seed}").config["layers"] == LAYERS


def test_all_targets_are_reached_also_on_a_text_that_was_not_learned_on():
    """With three layers, because many routers are calibrated and measured."""
    save_model("three", layers=3)
    Path("other.txt").write_text("".join(f"{count} whales in the sea, and no code.\n" for count in range(3000)))
    options = ["--model", "three", "--agents", "{REINFORCE: REINFORCE}", "--rivals", "[]", "--total_decisions", "800"]
    budgets = ["--env.prices", "[0.1, 1.0]", "--targets", "[0.4, 0.8]", "--reach_targets", "true"]
    where = ["--transfer", '["other.txt"]', "--processes", "1", "--out", "budgets"]
    main(["compare", "--config", "tiny.yaml", *options, *budgets, *where])
    learned, other = json.loads(Path("budgets/budgets.json").read_text())["texts"].values()
    assert (learned["transfer"]["learned"], other["transfer"]["learned"]) == (True, False)
    for row in learned["rows"]:
        assert row["loss"] > 0 and 0 <= row["top1_agreement"] <= 1 and row["flops_per_token"] > 0
    for router in learned["routers"]:
        spent = [step["compute"] for step in router["frontier"]]
        assert spent == sorted(spent) and len(spent) == {"best fixed": 4, "REINFORCE": 7 + 4}[router["router"]]
    assert [row["target"] for row in other["transfer"]["rows"]] == [0.4, 0.4, 0.8, 0.8]
    assert all(0 < row["calibrated"]["compute"] < 1 for row in other["transfer"]["rows"])
    assert Path("budgets/figures/budgets-other.txt.png").is_file()
    assert "not learned on" in Path("budgets/budgets.md").read_text()
    assert "No router learned on this text" in Path("budgets/report.html").read_text()


def test_a_target_compute(said_before):
    options = ["--target_compute", "0.6", "--rivals", "[]", "--out", "target"]
    before = said_before("train", "--config", "tiny.yaml", *options)
    rows = assert_bounded_below("target", before)
    assert rows["PPO"]["compute"] == pytest.approx(0.6, abs=0.1)


def test_a_hard_budget_is_kept(said_before):
    options = ["--agent", "MaskablePPO", "--env.big_layers", "9", "--total_decisions", "1500"]
    rivals = ["--rivals", "{soft: {class_path: Soft, init_args: {updates: 2}}}"]
    before = said_before("train", "--config", "tiny.yaml", *options, *rivals, "--out", "hard")
    rows = assert_bounded_below("hard", before)
    for name in ("MaskablePPO", "soft"):
        assert rows[name]["actions"]["big"] == 9 / LAYERS
        assert rows[name]["actions_interval"]["big"] == [9 / LAYERS] * 2


def test_oracle(capsys):
    config = yaml.safe_load(Path("tiny.yaml").read_text())
    where = ["--model", "deep", "--corpus", config["corpus"][0], "--windows", "1", "--window", "16"]
    main(["oracle", *where, "--price", "0.1", "--out", "oracle"])
    printed = capsys.readouterr().out
    assert "search: descent, a lower bound of the oracle, about" in printed
    found = json.loads(Path("oracle/oracle.json").read_text())
    assert (found["method"], found["bound"]) == ("descent", "lower bound") and "oracle" not in found
    assert "Token difficulty, at least" in Path("oracle/difficulty.html").read_text()
    head = Path("oracle/tokens.csv").read_text().splitlines()[0].split(",")
    assert "lower_bound" in head and "oracle" not in head
    assert "descent is a lower bound of the oracle's return" in printed


def test_paper(capsys, monkeypatch):
    """With six layers and a low limit, because a study of 18 takes minutes."""
    monkeypatch.setattr("duorl.oracle.search.MOST_ROUTES", 32)
    save_model("six", layers=6)
    config = yaml.safe_load(Path("tiny.yaml").read_text())
    size = ["--size.windows=2", "--size.pattern_windows=1", "--size.final_windows=1", "--size.random_patterns=3"]
    size += ["--size.big=[]", "--size.prices=[0.3]", "--total_decisions=200", "--env.window=12"]
    text = [f"--{name}={config['corpus'][0]}" for name in ("prose", "code")]
    agents = ["--agents", "{REINFORCE: REINFORCE}", "--soft.updates=1", "--env.windows_per_batch=1"]
    main(["paper", "--model=six", *text, *agents, *size, "--out=paper"])
    assert "a search takes the oracle's place, a lower bound of the oracle's return" in capsys.readouterr().out
    page, claims = Path("paper/report.html").read_text(), Path("paper/claims.md").read_text()
    assert "too many to enumerate" in page and "too many to enumerate" in claims
    assert json.loads(Path("paper/figure-5.json").read_text())["bound"] == "lower bound"
