"""The tutorial docs/tutorials/your-model.md, step by step, with its own commands on its own small model."""

import json
import shlex
from pathlib import Path

import pytest
from test_docs import ROOT, blocks, commands

import duorl
from duorl.cli import main

PAGE = ROOT / "docs" / "tutorials" / "your-model.md"
_EVALUATION = ["--evaluation.windows=4", "--evaluation.reference_windows=2", "--evaluation.fixed_windows=2"]
_EVALUATION += ["--evaluation.final_windows=2", "--evaluation.finalists=2", "--evaluation.bound=none"]
# What makes each command quick; the page's own words stay.
QUICK = {
    "convert": ["--window=32", "--choose.tokens=1024", "--evaluation_windows=2"],
    "train": [*_EVALUATION, "--env.window=16", "--total_decisions=800", "--rivals=[]", "--validations=1"],
    "compare": [*_EVALUATION, "--env.window=16", "--total_decisions=800", "--env.windows_per_batch=1", "--seeds=1"],
    "evaluate": [*_EVALUATION, "--window=16"],
}
QUICK["compare"] += ["--agents={REINFORCE: REINFORCE}", "--rivals=[]", "--own_env={}", "--targets=[0.5]"]
QUICK["compare"] += ["--validations=1", "--processes=1"]


@pytest.mark.slow
def test_every_step_works(tmp_path, small_corpus, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec("\n".join(blocks(PAGE, "python")), {})
    for command in commands(PAGE):
        name, *words = shlex.split(
            command.replace("configs/", f"{ROOT}/configs/").replace("stdlib-docs", small_corpus)
        )[1:]
        corpus = [] if "--corpus" in words else ["--corpus", f"[{small_corpus}]"]
        main([name, *words, *corpus, *QUICK[name]])
    assert "# Small networks for mine" in Path("small/README.md").read_text()
    rows = json.loads(Path("runs/compare/comparison.json").read_text())["rows"]
    assert {"REINFORCE", "best fixed"} <= {row["router"] for row in rows}
    calibrated = next(Path("runs").glob("evaluate-*/comparison.json")).read_text()
    assert any("at 0.5" in row["router"] for row in json.loads(calibrated)["rows"])


@pytest.mark.slow
def test_the_router_is_used_as_the_page_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    duorl.load("duo-tiny").save_pretrained("small")
    duorl.load_tokenizer("duo-tiny").save_pretrained("small")
    duorl.routers.ConstantRouter("small").save_pretrained("runs/first/router")
    namespace = {"duorl": duorl}
    exec(blocks(PAGE, "py")[0], namespace)
    assert namespace["ids"].shape[0] == 1
