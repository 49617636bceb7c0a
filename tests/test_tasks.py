"""Tasks of lm-evaluation-harness: a multiple-choice task of our own, from the standard library's documentation."""

import json
import random
import re

import numpy as np
import pytest
import torch

import duorl
from duorl.checks import BadInput
from duorl.cli import main
from duorl.corpus import documents
from duorl.evaluation.tasks import ALL_BIG, _harness, load_tasks, task_rows
from duorl.reports.tasks import tasks_markdown
from duorl.routers import ConstantRouter, HeadRouter, MixedRouter, PatternRouter

pytest.importorskip("lm_eval", reason='needs pip install -e ".[lm-eval]"')

_TASK = """
task: continuations
dataset_path: json
dataset_kwargs: {{data_files: "{data}"}}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
_WRITTEN = """
doc_to_target: "x"
generation_kwargs: {until: ["\\n"], max_gen_toks: 12}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A paragraph begins; which of four goes on with it? Of text that duo-tiny did not learn from."""
    folder, draw = tmp_path_factory.mktemp("task"), random.Random(0)
    files = documents("stdlib-docs", "evaluation")
    paragraphs = dict.fromkeys(" ".join(part.split()) for file in files for part in file.text.split("\n\n"))
    words = [part.split() for part in paragraphs if part[:1].isupper()]
    halves = [(" ".join(part[:14]), " " + " ".join(part[14:24])) for part in words if 24 <= len(part) <= 60]
    draw.shuffle(halves)
    rows = []
    for place, (question, answer) in enumerate(halves[:240]):
        choices = [answer, *(halves[(place + step) % len(halves)][1] for step in (1, 2, 3))]
        draw.shuffle(choices)
        rows.append({"question": question, "choices": choices, "answer": choices.index(answer)})
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "continuations.yaml").write_text(_TASK.format(data=folder / "questions.jsonl"))
    return str(folder / "continuations.yaml")


@pytest.mark.slow
def test_all_big_is_above_chance(task):
    (row,) = task_rows(
        duorl.load(), duorl.load_tokenizer(), {ALL_BIG: ConstantRouter("big")}, load_tasks([task]), batch=32
    )
    assert row["questions"] == 240 and row["compute"] == pytest.approx(1.0)
    low, high = row["metrics"]["acc_norm"]["interval"]
    assert 0.25 < 0.3 < low < row["metrics"]["acc_norm"]["value"] < high < 0.6


def test_texts_that_do_not_fit_into_memory_are_refused(task, monkeypatch):
    model, tokenizer, routers = duorl.load(), duorl.load_tokenizer(), {ALL_BIG: ConstantRouter("big")}
    monkeypatch.setattr("duorl.devices.free_bytes", lambda device: 2**20)
    with pytest.raises(BadInput, match=r"tokens at once do not fit into memory: .*lower task_batch \(4\)"):
        task_rows(model, tokenizer, routers, load_tasks([task]), limit=8, batch=4)


def test_one_question_has_no_interval(task):
    routers = {"half": PatternRouter([1, 2] * 4), ALL_BIG: ConstantRouter("big")}
    rows = task_rows(duorl.load(), duorl.load_tokenizer(), routers, load_tasks([task]), limit=1)
    assert all(row["metrics"]["acc"]["interval"] is None for row in rows)
    assert re.search(r"\| half \| 0\.\d\d \| acc \| [01]\.000 \| [+-][01]\.000 \|", tasks_markdown(rows))


def test_the_batch_changes_nothing(task):
    model, tokenizer = duorl.load(), duorl.load_tokenizer()
    heads = HeadRouter(8, 192)
    torch.manual_seed(0)
    for parameter in heads.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    routers = {ALL_BIG: ConstantRouter("big"), "heads": heads, "pattern": PatternRouter([1, 2] * 4)}
    one, eight = (task_rows(model, tokenizer, routers, load_tasks([task]), limit=16, batch=batch) for batch in (1, 8))
    for alone, together in zip(one, eight, strict=True):
        assert alone["metrics"] == together["metrics"]
        assert alone["compute"] == pytest.approx(together["compute"], abs=1e-6)
    compute = {row["router"]: row["compute"] for row in one}
    assert compute[ALL_BIG] == pytest.approx(1.0) and compute["pattern"] == pytest.approx(0.53125)
    assert 0.1 < compute["heads"] < 0.9
    assert one[0]["metrics"]["acc"]["minus_all_big"] == 0.0


def test_answers_of_one_batch_cost_what_they_cost_alone(tmp_path):
    """Each ends at its own stop string, and the harness goes on until all have ended."""
    questions = ["def main(", "import os\nimport sys\n\nclass", "for i in", "x = [1,"]
    (tmp_path / "questions.jsonl").write_text("\n".join(json.dumps({"question": one}) for one in questions))
    written = _TASK.format(data=tmp_path / "questions.jsonl").partition("doc_to_choice")[0]
    written = written.replace("multiple_choice", "generate_until").replace("continuations", "written")
    (tmp_path / "written.yaml").write_text(written + _WRITTEN)
    model, tokenizer, tasks = duorl.load(), duorl.load_tokenizer(), load_tasks([str(tmp_path / "written.yaml")])
    mixed = MixedRouter([ConstantRouter("small"), ConstantRouter("big")], [0.5, 0.5], seed=1)
    routers = {ALL_BIG: ConstantRouter("big"), "drawn": mixed}
    one, four = (task_rows(model, tokenizer, routers, tasks, batch=batch) for batch in (1, 4))
    for alone, together in zip(one, four, strict=True):
        assert alone["compute"] == pytest.approx(together["compute"], abs=1e-6)
    assert 0.1 < one[1]["compute"] < 1.0


def test_accuracy_is_compared_with_a_draw_between_fixed_routers(task):
    """Half of the questions to all-small and half to all-big: the mean of their accuracies, at the mean compute."""
    half = MixedRouter([ConstantRouter("small"), ConstantRouter("big")], [0.5, 0.5])
    routers = {ALL_BIG: ConstantRouter("big"), "all-small": ConstantRouter("small"), "drawn": half}
    rows = task_rows(duorl.load(), duorl.load_tokenizer(), routers, load_tasks([task]), limit=16)
    found = {row["router"]: row for row in rows}
    ends = [(found[name]["compute"], found[name]["metrics"]["acc"]["value"]) for name in ("all-small", ALL_BIG)]
    drawn = found["drawn"]
    compute, accuracy = zip(*ends, strict=True)
    expected = drawn["metrics"]["acc"]["value"] - np.interp(drawn["compute"], compute, accuracy)
    if accuracy[0] <= accuracy[1]:  # else all-small is as good for less, and nobody mixes
        assert drawn["metrics"]["acc"]["minus_mix"] == pytest.approx(expected)
    low, high = drawn["metrics"]["acc"]["minus_mix_interval"]
    assert low <= drawn["metrics"]["acc"]["minus_mix"] <= high
    assert found["all-small"]["metrics"]["acc"]["minus_mix"] is None
    assert "minus fixed mix" in tasks_markdown(rows)


def test_a_token_with_the_number_0_is_no_padding(task):
    """A text that ends in token 0 is read to its end: its compute counts."""
    harness = _harness()(duorl.load(), duorl.load_tokenizer(), PatternRouter([1, 2] * 4), 4)
    requests = [(("", ""), [5, 6, 7], [0, 0, 9]), (("", ""), [5], [8])]
    harness._loglikelihood_tokens(requests, disable_tqdm=True)
    assert harness.tokens == (3 + 3 - 1) + (1 + 1 - 1)


def test_a_router_is_measured_on_tasks_from_the_command_line(task, small_corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    PatternRouter([1, 2] * 4).save_pretrained("pattern")
    size = ["--quick", "--evaluation.windows=2", "--evaluation.fixed_windows=2", "--window=16"]
    main(["evaluate", "--router=pattern", f"--corpus={small_corpus}", *size, "--tasks", json.dumps([task]),
          "--task_questions=8", "--out=run"])  # fmt: skip
    rows = json.loads((tmp_path / "run" / "tasks.json").read_text())
    assert [row["router"] for row in rows] == ["pattern", "all-big", "all-small", "best fixed"]
    printed, page = capsys.readouterr().out, (tmp_path / "run" / "report.html").read_text()
    for row in rows:
        value = f"{row['metrics']['acc']['value']:.3f}"
        assert re.search(rf"continuations.*{row['router']}.*{row['compute']:.2f}.*acc .*{value}", printed)
        assert re.search(rf"<td>{row['router']}</td><td>{row['compute']:.2f}</td><td>acc</td><td>{value} ", page)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tasks", '["no_such_task"]'], "no task 'no_such_task': give a task of lm-evaluation-harness"),
        (["--tasks", "no_such_task,{task}"], "no task 'no_such_task': give a task of lm-evaluation-harness"),
        (["--tasks", '["missing.yaml"]'], "missing.yaml"),
        (["--tasks", '["{task}"]', "--task_batch=0"], "task_batch must be at least 1"),
    ],
)
def test_bad_tasks_are_refused(options, said, task, small_corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    PatternRouter([1, 2] * 4).save_pretrained("pattern")
    words = ["evaluate", "--router=pattern", f"--corpus={small_corpus}", "--window=16", "--out=run"]
    with pytest.raises(SystemExit) as stopped:
        main([*words, *(option.format(task=task) for option in options)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and said in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
