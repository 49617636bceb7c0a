"""Whatever is wrong with what a user gives, a command says it in one line, with exit code 2, and leaves no folder.

Good inputs are spoiled at random. What is still good after that passes all checks of a command, and is not counted; a
test asks for so many inputs that were refused.
"""

import gzip
import json
import math
import shutil
import sys
from copy import deepcopy
from itertools import count
from pathlib import Path

import pyarrow
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import duorl
from duorl import corpus
from duorl.cli import main, running
from duorl.models.tokenizer import train_tokenizer
from duorl.routers import BudgetRouter, EnsembleRouter, HeadRouter, KNNRouter, PatternRouter

WORDS = "the router takes a token by its state and skips or runs a network of one layer while others wait"
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
ODD = [None, True, -1, 0, 1, 7, 2**40, 0.5, -0.5, math.nan, math.inf, "", "x", "big", [], [1], ["x"], {}, {"a": 1}]
TRAIN = {
    "agent": {"class_path": "REINFORCE", "init_args": {"learning_rate": 0.01, "width": 0}},
    "reward": {"class_path": "LossImprovement", "init_args": {"price": 0.3}},
    "model": "model",
    "corpus": ["text.txt"],
    "actions": ["small", "big"],
    "reference": "small",
    "total_decisions": 100,
    "env": {"window": 8, "windows_per_batch": 1, "group_size": 2, "token_discount": 0.5, "inputs": ["update_norm"]},
    "own_env": {"REINFORCE": {"group_size": 2}},
    "rivals": {"KNN": {"class_path": "KNN", "init_args": {"windows": 2, "neighbours": 4}}},
    "evaluation": {"windows": 4, "reference_windows": 1, "fixed_windows": 1, "finalists": 1, "final_windows": 1},
    "seed": 0,
}
_numbers = count()


class Passed(BaseException):
    """All checks are behind the command: it would write now."""


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder to work in, with a model, a text and routers that are good."""
    folder = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", [*sys.path])
        patch.setattr(corpus, "_BLOCK_CHARACTERS", 256)  # a short text has all splits
        patch.setattr(running, "_claimed", passed)
        words = WORDS.split()
        lines = [" ".join([str(i), *(words[(5 * i + j * j) % len(words)] for j in range(12))]) for i in range(300)]
        Path("text.txt").write_text("\n".join(lines))
        make_model(lines)
        PatternRouter([1, 2]).save_pretrained("pattern")
        Path("good.yaml").write_text(yaml.safe_dump(TRAIN))
        assert not refused("train", "--config", "good.yaml") and not refused(*evaluation())
        yield lines


def passed(*arguments):
    raise Passed


def make_model(lines):
    tokenizer = train_tokenizer(lines, 300)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model("llama", **SIZES, vocab_size=300, max_position_embeddings=64)
        duo = duorl.convert(AutoModelForCausalLM.from_config(config), small_ratio=4)
    duo.save_pretrained("model")
    tokenizer.save_pretrained("model")


def refused(*words) -> bool:
    """Whether a command refuses its input, as it should: in one line, with nothing left behind."""
    before = {path for path in Path().iterdir() if path.name != "__pycache__"}
    with pytest.MonkeyPatch.context() as patch:
        said = Written()
        patch.setattr(sys, "stderr", said)
        try:
            main([*words, "--out", "out"])
        except Passed:
            return False
        except SystemExit as stopped:
            assert stopped.code == 2
    (line,) = said.text.strip().splitlines()
    assert line.startswith("duorl: error: ") and len(line) < 1000, line
    assert {path for path in Path().iterdir() if path.name != "__pycache__"} == before
    return True


def evaluation(router="pattern", model="model", text="text.txt") -> list[str]:
    return ["evaluate", "--router", router, "--model", model, "--corpus", text, "--window", "8"]


class Written:
    """A standard error that keeps what commands say, less what libraries warn of."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        if sys._getframe(1).f_code.co_name == "fail" or "Traceback" in text or "rror" in text:
            self.text += text

    def flush(self):
        pass

    def isatty(self):
        return False


def spoiled_bytes(content: bytes):
    """A file's content with something wrong in its bytes."""
    place = st.integers(0, max(0, len(content) - 1))
    junk = st.sampled_from(
        [b"\x00", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xff\xfe", b"\r", b"\n", b"{", b'"', b"\\ud800"]
    )
    return st.one_of(
        place.map(lambda end: content[:end]),
        st.tuples(place, junk).map(lambda it: content[: it[0]] + it[1] + content[it[0] :]),
        st.tuples(place, st.integers(0, 255)).map(lambda it: content[: it[0]] + bytes([it[1]]) + content[it[0] + 1 :]),
        st.tuples(place, place).map(lambda it: content[: min(it)] + content[max(it) :]),
        st.just(gzip.compress(content, mtime=0)),
        st.binary(max_size=40),
    )


def paths(tree, prefix=()):
    """Where values stand in nested dictionaries and lists."""
    found = [prefix] if prefix else []
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(items)[:30]:
        found += paths(value, (*prefix, key))
    return found


def spoiled_tree(tree):
    """Nested values of which one is gone, or another one, or one too many."""

    def spoil(choice):
        path, kind, odd = choice
        changed = deepcopy(tree)
        parent = changed
        for key in path[:-1]:
            parent = parent[key]
        if kind == "gone":
            del parent[path[-1]]
        elif kind == "more" and isinstance(parent, dict):
            parent["more"] = odd
        else:
            parent[path[-1]] = odd
        return changed

    kinds = st.sampled_from(["gone", "other", "other", "other", "more"])
    return st.tuples(st.sampled_from(paths(tree)), kinds, st.sampled_from(ODD)).map(spoil)


def fuzz(examples):
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=checks)


def run(strategy, examples, trial, least):
    """Try examples; at least so many are refused."""
    found = []

    @fuzz(examples)
    @given(strategy)
    def attempt(example):
        found.append(trial(example))

    attempt()
    assert sum(found) >= least, f"only {sum(found)} of {len(found)} are refused"


# Corpora

ROW = st.one_of(
    st.sampled_from(ODD).map(lambda odd: json.dumps({"text": odd})),
    st.sampled_from(ODD).map(json.dumps),
    st.sampled_from(
        ['{"text": "\\ud800"}', '{"text": "a\\u0000"}', '{"body": "x"}', '{"text": "x"', "{'text': 'x'}", "", "["]
    ),
    st.text(max_size=8).map(lambda text: json.dumps({"text": text})),
)


def corpora(lines):
    text = "\n".join(lines).encode()
    rows = [json.dumps({"text": line}) for line in lines]
    put = st.tuples(st.integers(0, len(rows)), ROW).map(lambda it: "\n".join([*rows[: it[0]], it[1], *rows[it[0] :]]))
    return st.one_of(
        spoiled_bytes(text).map(lambda content: ("a.txt", content)),
        put.map(lambda content: ("a.jsonl", content.encode("utf8", "surrogatepass"))),
        spoiled_bytes("\n".join(rows).encode()).map(lambda content: ("a.jsonl", content)),
        spoiled_bytes(parquet_bytes({"text": lines})).map(lambda content: ("a.parquet", content)),
        st.sampled_from(["text", "body", ""]).flatmap(
            lambda name: st.sampled_from([[1, 2], [None, "x"], [[1]], [b"\xff"], [True], [{"a": 1}], [], ["x\0"]]).map(
                lambda column: ("a.parquet", parquet_bytes({name: column}))
            )
        ),
        st.sampled_from(["a.csv", "a.txt.gz", "a", "a.json"]).map(lambda name: (name, text)),
    )


def parquet_bytes(columns) -> bytes:
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table(columns), sink)
    return sink.getvalue().to_pybytes()


def test_spoiled_corpora(here):
    def trial(example):
        name, content = example
        Path(name).write_bytes(content)
        try:
            return refused(*evaluation(text=name))
        finally:
            Path(name).unlink()

    run(corpora(here), 80, trial, least=50)


# Models

FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")


def named(name, contents):
    return contents.map(lambda content: (name, content))


def as_json(tree) -> bytes:
    return json.dumps(tree).encode()


def models():
    trees = {name: json.loads(Path("model", name).read_text()) for name in FILES}
    weights = Path("model/model.safetensors").read_bytes()
    return st.one_of(
        *[
            spoiled_tree(tree).map(lambda tree, name=name: (name, json.dumps(tree).encode()))
            for name, tree in trees.items()
        ],
        *[
            spoiled_bytes(json.dumps(tree).encode()).map(lambda content, name=name: (name, content))
            for name, tree in trees.items()
        ],
        named("model.safetensors", spoiled_bytes(weights)),
        named("model.safetensors", spoiled_tensors("model/model.safetensors")),
        st.sampled_from([*FILES, "model.safetensors"]).map(lambda name: (name, None)),
    )


def spoiled_tensors(path):
    """A change of a file of tensors: one is gone, another, too many, or no number."""
    names = st.sampled_from(sorted(load_file(path)))
    changes = {
        "gone": lambda tensors, name: tensors.pop(name),
        "nan": lambda tensors, name: tensors.update({name: tensors[name] * math.nan}),
        "infinite": lambda tensors, name: tensors.update({name: tensors[name] + math.inf}),
        "longer": lambda tensors, name: tensors.update({name: torch.cat([tensors[name], tensors[name][:1]])}),
        "shorter": lambda tensors, name: tensors.update({name: tensors[name][1:].clone()}),
        "whole": lambda tensors, name: tensors.update({name: tensors[name].to(torch.int64)}),
        "more": lambda tensors, name: tensors.update({f"{name}.more": tensors[name].clone()}),
    }
    return st.tuples(names, st.sampled_from(sorted(changes))).map(
        lambda it: lambda tensors: changes[it[1]](tensors, it[0])
    )


def spoil(folder, name, content):
    """A copy of a folder with one file spoiled."""
    shutil.rmtree("copy", ignore_errors=True)
    shutil.copytree(folder, "copy")
    path = Path("copy", name)
    if content is None:
        path.unlink()
    elif callable(content):
        tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
        content(tensors)
        save_file(tensors, path)
    else:
        path.write_bytes(content)


def test_spoiled_models(here):
    def trial(example):
        spoil("model", *example)
        return refused(*evaluation(model="copy"))

    run(models(), 80, trial, least=50)


# Routers


def routers():
    made = [
        HeadRouter(2, 16, inputs=["update_norm"]),
        HeadRouter(2, 16, width=3, prices=[0.1, 1.0]),
        EnsembleRouter(2, 16, members=2),
        KNNRouter(2, 16, 8, neighbours=2),
        BudgetRouter(HeadRouter(2, 16), 1),
        PatternRouter([1, 2]),
    ]
    strategies = []
    for number, router in enumerate(made):
        router.trained_for = None
        folder = f"router-{number}"
        router.save_pretrained(folder)
        tree = json.loads(Path(folder, "router.json").read_text())
        strategies.append(spoiled_tree(tree).map(lambda tree, f=folder: (f, "router.json", json.dumps(tree).encode())))
        text = json.dumps(tree).encode()
        strategies.append(spoiled_bytes(text).map(lambda content, f=folder: (f, "router.json", content)))
        weights = Path(folder, "router.safetensors")
        if weights.is_file():
            content = weights.read_bytes()
            strategies.append(spoiled_bytes(content).map(lambda content, f=folder: (f, "router.safetensors", content)))
            changes = spoiled_tensors(weights)
            strategies.append(changes.map(lambda change, f=folder: (f, "router.safetensors", change)))
    return st.one_of(strategies)


def test_spoiled_routers(here):
    def trial(example):
        spoil(*example)
        return refused(*evaluation("copy"))

    run(routers(), 80, trial, least=50)


# Configurations

TEXTS = [
    "seed: 1\nseed: 2",
    "a: &a [*a]",
    "env: {",
    "- 1",
    "seed: !!python/name:os.system",
    "\tseed: 1",
    "config: x.yaml",
    "1: 2",
]


def test_spoiled_configurations(here):
    text = yaml.safe_dump(TRAIN)
    strategy = st.one_of(
        spoiled_tree(TRAIN).map(lambda tree: yaml.safe_dump(tree).encode()),
        spoiled_bytes(text.encode()),
        st.sampled_from(TEXTS).map(str.encode),
    )

    def trial(content):
        Path("config.yaml").write_bytes(content)
        try:
            return refused("train", "--config", "config.yaml")
        finally:
            Path("config.yaml").unlink()

    run(strategy, 80, trial, least=50)


# Rewards

VALUES = [
    "step.compute * float('nan')", "step.compute + float('inf')", "step.compute / 0", "step.compute[:3]", "1.0", "None",
    "step.hidden", "step.compute[:, None]", "step.compute.numpy()", "step.compute.to(torch.complex64)", "step.nothing",
    "step.gain.log()", "[1.0] * len(step.compute)", "1 / 0", "undefined", "step.compute * 1e30", "step.compute.sum()",
    "{}['x']", "torch.empty(0)", "sys.exit(3)", "-step.loss", "str(step)",
]  # fmt: skip
BODIES = [
    "pass",
    "raise KeyError('x')",
    "raise Exception",
    "self.price = float('nan')",
    "self.price = 'dear'",
    "sys.exit(4)",
]
HEADS = [
    "class R(duorl.rewards.Reward):",
    "class R:",
    "class R(abc.ABC):",
    "class R(duorl.rewards.Reward, int):",
    "R = 3",
]
REWARD = """import abc, sys, torch, duorl.rewards
{head}
    def __init__({arguments}):
        {body}
    def __call__(self, step):
        return {value} if step.layer == {layer} else 0 * step.compute
    def contextual(self, step):
        return {later}
"""


@st.composite
def rewards(draw):
    good = draw(st.integers(0, 4))  # which of the five stays as it should not
    text = REWARD.format(
        head="class R(duorl.rewards.Reward):" if good else draw(st.sampled_from(HEADS)),
        arguments="self" if good != 1 else draw(st.sampled_from(["self, x", "", "self, x: int", "self, *, y: 'Y'"])),
        body="pass" if good != 2 else draw(st.sampled_from(BODIES)),
        value=draw(st.sampled_from(VALUES)) if good == 3 else "step.action == 1",
        layer=draw(st.integers(0, 1)),
        later=draw(st.sampled_from(VALUES)) if good == 4 else "step.gain",
    )
    return text[: draw(st.integers(0, len(text)))] if draw(st.integers(0, 5)) == 0 else text


def test_spoiled_rewards(here):
    Path("base.yaml").write_text(
        yaml.safe_dump({**TRAIN, "reward": None} | {"rivals": {}}).replace("reward: null\n", "")
    )

    def trial(text):
        name = f"fuzzed_{next(_numbers)}"
        Path(f"{name}.py").write_text(text)
        try:
            return refused("train", "--config", "base.yaml", "--reward", f"{name}.R")
        finally:
            Path(f"{name}.py").unlink()
            sys.modules.pop(name, None)

    run(rewards(), 80, trial, least=50)
