"""What goes wrong in a run is one line on the terminal, and nothing is lost by it."""

import copy
import errno
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import refused
from safetensors.torch import load_file, save_file

import duorl
from duorl.cli import main
from duorl.models import model_folder
from duorl.routers import HeadRouter
from duorl.runs import checkpoints, folders

EVALUATION = "{windows: 4, reference_windows: 1, fixed_windows: 1, finalists: 2, final_windows: 2}"
TINY = f"""
total_decisions: 2500
validations: 1
save_every: 0
rivals: []
agent: REINFORCE
env: {{windows_per_batch: 1, group_size: 2, window: 32}}
evaluation: {EVALUATION}
"""
CHECKPOINT = Path("run/router/checkpoint.safetensors")


@pytest.fixture
def train(tmp_path, monkeypatch, small_corpus):
    """The words of a tiny training, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(TINY)
    return ["train", "--config", "tiny.yaml", "--corpus", small_corpus]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, small_corpus):
    """The weights of the training that nothing happens to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("alone"))
        Path("tiny.yaml").write_text(TINY)
        main(["train", "--config", "tiny.yaml", "--corpus", small_corpus, "--out", "run"])
        return weights("run")


def failed(words, capsys) -> tuple[str, str]:
    """What a failed run says on standard output, and the line on standard error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(words)
    said = capsys.readouterr()
    assert stopped.value.code == 1 and "Traceback" not in said.out + said.err
    (line,) = said.err.strip().splitlines()
    return said.out, line


def stop_after_the_first_checkpoint(words, monkeypatch):
    save = checkpoints.save

    def saving(path, state):
        save(path, state)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(checkpoints, "save", saving)
        main(words)
    assert stopped.value.code == 143 and CHECKPOINT.is_file()


def weights(run):
    return Path(run, "router/router.safetensors").read_bytes()


@pytest.mark.slow
def test_a_checkpoint_that_is_none_is_named_in_one_line_and_kept(train, alone, capsys, monkeypatch):
    stop_after_the_first_checkpoint([*train, "--out", "run"], monkeypatch)
    whole = CHECKPOINT.read_bytes()
    state = copy.deepcopy(checkpoints.load(CHECKPOINT))  # it is the file's own memory, which is overwritten below
    del state["learner"]["router"]

    def foreign():
        save_file({"weight": torch.zeros(2)}, CHECKPOINT)

    for spoil in (
        lambda: CHECKPOINT.write_bytes(whole[: len(whole) // 2]),
        lambda: CHECKPOINT.write_text("no checkpoint"),
        foreign,
        lambda: checkpoints.save(CHECKPOINT, {"of": "another kind"}),
        lambda: checkpoints.save(CHECKPOINT, state),
    ):
        spoil()
        spoiled = CHECKPOINT.read_bytes()
        said, line = failed([*train, "--out", "run", "--resume"], capsys)
        said = " ".join(said.split())
        assert f"REINFORCE failed: ValueError: {CHECKPOINT} is" in said and "delete it to start anew" in said
        assert "1 of 1 jobs are not finished: REINFORCE; go on with: " in line and line.endswith("--resume")
        assert CHECKPOINT.read_bytes() == spoiled and not Path("run/router/router.json").exists()
    CHECKPOINT.write_bytes(whole)
    main([*train, "--out", "run", "--resume"])
    assert weights("run") == alone and not CHECKPOINT.exists()


@pytest.mark.slow
def test_a_full_disk_at_a_checkpoint_is_one_line_and_loses_nothing(train, alone, capsys, monkeypatch):
    write, before = Path.write_bytes, []

    def writing(path, content):
        """There is room for one checkpoint, and for half of the second."""
        if path.name.endswith(CHECKPOINT.name) and CHECKPOINT.is_file():
            before.append(CHECKPOINT.read_bytes())
            write(path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", writing)
        said, line = failed([*train, "--out", "run"], capsys)
    assert "REINFORCE failed: the disk is full" in said and line.endswith("--resume")
    assert [CHECKPOINT.read_bytes()] == before and not list(Path("run").rglob(".part-*"))
    main([*train, "--out", "run", "--resume"])
    assert weights("run") == alone


def test_the_second_of_two_runs_in_one_folder_is_refused(train, capsys, monkeypatch):
    with folders.claim("same", "mine", "seed: 0\n"):
        kept = sorted(Path("same").iterdir())
        for flags in ([], ["--resume"], ["--overwrite"]):
            assert "another process works in same: wait for it" in refused([*train, "--out", "same", *flags], capsys)
        # Both had looked before either took it.
        monkeypatch.setattr(folders, "check", lambda *arguments, **flags: None)
        assert "another process works in same" in refused([*train, "--out", "same"], capsys)
        assert sorted(Path("same").iterdir()) == kept


# Bad input that a command finds before it writes


@pytest.fixture
def model(tmp_path):
    """A copy of duo-tiny's folder that may be spoiled."""
    return Path(shutil.copytree(model_folder("duo-tiny"), tmp_path / "model"))


def change(name, **changes):
    def spoil(folder):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return spoil


def change_weights(spoil):
    def change(folder):
        path = folder / "model.safetensors"
        tensors = load_file(path)
        spoil(tensors)
        save_file(tensors, path, {"format": "pt"})

    return change


HEAD = "backbone.model.norm.weight"
BACKBONE = {"model_type": "llama", "num_hidden_layers": 8, "hidden_size": 192, "num_attention_heads": 3}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "config.json").write_text("{"), r"cannot read .*config\.json"),
        (lambda folder: (folder / "config.json").write_text("[]"), "holds no JSON object"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "cannot read the weights in"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "cannot load the tokenizer in"),
        (change("config.json", backbone={}), "names no transformers family"),
        (change("config.json", backbone=3), "no object `backbone`"),
        (change("config.json", backbone={**BACKBONE, "model_type": "nope"}), "cannot load the model in"),
        (change("config.json", backbone={**BACKBONE, "num_hidden_layers": 10**9}), "num_hidden_layers is 1000000000"),
        (change("config.json", backbone={**BACKBONE, "num_hidden_layers": 7}), "has shape"),
        (change("config.json", small_size=47), r"small\.down_proj\.weight has shape \(192, 48\) and not \(192, 47\)"),
        (change("config.json", small_size=0), "small_size must be a number of at least 1"),
        (change_weights(lambda tensors: tensors.pop(HEAD)), f"lack {HEAD}: fetch or save"),
        (change_weights(lambda tensors: tensors.update(more=torch.zeros(1))), "hold more, which"),
        (change_weights(lambda tensors: tensors[HEAD].fill_(torch.nan)), f"{HEAD} holds numbers that are not finite"),
    ],
)
def test_a_broken_model_is_refused_by_file_and_cause(spoil, message, model):
    spoil(model)
    with pytest.raises(ValueError, match=message) as refused:
        duorl.load(model), duorl.load_tokenizer(model)
    assert "names no" in message or "small_size" in message or "model" in str(refused.value)


REWARDS = """
import sys
import duorl.rewards
class Late(duorl.rewards.Reward):
    def __call__(self, step): return step.compute / (0 if step.layer == 5 else 1)
class Later(duorl.rewards.Reward):
    def __call__(self, step): return step.compute
    def contextual(self, step): return step.compute[:2]
class Huge(duorl.rewards.Reward):
    def __call__(self, step): return step.compute + 1e20
class Broken(duorl.rewards.Reward):
    def __call__(self, step): return step.nothing
class Dear(duorl.rewards.Reward):
    price = float("nan")
class Raises(duorl.rewards.Reward):
    def __init__(self): raise KeyError("x")
class Exits(duorl.rewards.Reward):
    def __init__(self): sys.exit(3)
"""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reward", "unfit.Late"], "Late returned a reward that is not finite, in layer 5"),
        (
            ["--reward", "unfit.Later", "--env.token_discount", "0.5"],
            r"Later.contextual must return .* not \(2,\)",
        ),
        (["--reward", "unfit.Huge"], r"Huge returned a reward that is beyond 1e\+15"),
        (["--reward", "unfit.Broken"], "Broken fails in layer 0: AttributeError"),
        (["--reward", "unfit.Dear"], "Dear: price must be at least 0 .* not nan"),
        (["--reward", "unfit.Raises"], "unfit.Raises: KeyError: 'x'"),
        (["--reward", "unfit.Exits"], "SystemExit: 3"),
        (["--reward", "ends.Reward"], "cannot import ends: SystemExit: 4"),
        (["--reward", "wrong.Reward"], r"cannot import wrong: SyntaxError: .*wrong.py, line 1"),
        (["--agent", "wrong.Agent"], "cannot import wrong: SyntaxError"),
        (["--agent.learning_rate", ".nan"], "learning_rate must be a finite number, not nan"),
        (["--agent.epochs", "0"], "epochs must be at least 1"),
        (["--own_env", "{PPO: {group_size: two}}"], "own_env of PPO: .*group_size.*Got value: two"),
        (["--own_env", "{PPO: {inputs: null}}"], "own_env of PPO: inputs cannot be null"),
        (["--own_env", "{PPO: {copies: 2}}"], "own_env of PPO: 'copies' is not an option"),
        (["--seed", "-1"], "seed must be in 0 to 4294967295"),
        (["--env.window", "2000"], "longer than the model's 1024 positions"),
        (["--env.group_size", "1000000000"], r"do not fit into memory: they take .* GiB free; lower group_size"),
        (
            ["--evaluation.batch", "1000000000", "--evaluation.windows", "1000000000"],
            r"32,000,000,000 tokens at once do not fit .* GiB free; lower evaluation\.batch \(1000000000\)",
        ),
        (["--device", "gpu"], "device must be auto, cpu, cuda, cuda:N or mps, not 'gpu'"),
        (["--device", "cuda:99"], "device cuda:99 is not there: this machine has cpu"),
        (["--threads", "0"], "threads must be at least 1, not 0"),
        (["--config", "twice.yaml"], r"twice\.yaml names seed twice"),
        (["--config", "latin.yaml"], r"latin\.yaml is not UTF-8: byte 9"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_parts_and_options_are_one_line(arguments, message, small_corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for module in ("unfit", "ends", "wrong"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    Path("unfit.py").write_text(REWARDS)
    Path("ends.py").write_text("import sys\nsys.exit(4)\n")
    Path("wrong.py").write_text("def f(:\n")
    Path("twice.yaml").write_text("seed: 1\nseed: 2\n")
    Path("latin.yaml").write_bytes("out: run-\xe9\n".encode("latin-1"))
    before = sorted(Path().iterdir())
    words = ["train", "--corpus", small_corpus, "--env.window", "32", "--rivals", "[]"]
    assert re.search(message, refused([*words, *arguments], capsys))
    assert sorted(path for path in Path().iterdir() if path.name != "__pycache__") == before


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ("{nothing: 1}", "has no option 'nothing'"),
        ("{max_steps: four}", "training.max_steps must be int, not 'four'"),
        ("{learning_rate: fast}", "training.learning_rate must be float"),
        ("{per_device_train_batch_size: 0}", "training.per_device_train_batch_size must be at least 1"),
        ("{optim: nope}", "nope is not a valid OptimizerNames"),
        ("{report_to: nope}", "nope is not supported"),
        ("{lr_scheduler_kwargs: {nope: 1}}", "unexpected keyword argument 'nope'"),
        ("{output_dir: x}", "training.output_dir is not for stage 1 to take: give out"),
        ("{gradient_checkpointing: true}", "is not for stage 1 to take"),
    ],
)
def test_what_transformers_trains_with_is_checked_first(training, message, small_corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    backbone = "{model_type: llama, hidden_size: 8, intermediate_size: 8, num_hidden_layers: 1, num_attention_heads: 1}"
    Path("text.txt").write_text("\n".join(Path(small_corpus).read_text().splitlines()[:9000]))
    words = ["pretrain", "--corpus", "text.txt", "--vocab_size", "257", "--window", "16", "--backbone", backbone]
    assert re.search(message, refused([*words, "--out", "run", "--training", training], capsys))
    assert not Path("run").exists()


def test_every_text_has_a_split_to_be_measured_on(small_corpus, tmp_path, monkeypatch, capsys):
    """The tables at equal compute are one for each text, and come after all trainings."""
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("One short text.")
    words = ["compare", "--agents", "{PPO: PPO}", "--rivals", "[]", "--env.prices", "[0.1, 1]", "--targets", "[0.5]"]
    line = refused([*words, "--corpus", f"[{small_corpus}, short.txt]", "--env.window", "32", "--out", "run"], capsys)
    assert "evaluation split of short.txt is shorter than a window" in line and not Path("run").exists()


@pytest.mark.slow
def test_a_run_whose_router_is_broken_or_whose_model_is_another_says_so(train, model, capsys):
    """Nothing is trained anew: it is the user's to say which of both is meant."""
    words = [*train, "--model", str(model), "--out", "run"]
    main(words)
    change_weights(lambda tensors: tensors.update({name: tensor * 1.5 for name, tensor in tensors.items()}))(model)
    assert "HeadRouter was trained for the model" in failed([*words, "--resume"], capsys)[1]
    path = Path("run/router/router.safetensors")
    path.write_bytes(path.read_bytes()[:50])
    assert "router.safetensors is broken" in failed([*words, "--resume"], capsys)[1]


def test_a_router_that_may_take_what_the_bound_may_not_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    HeadRouter(8, 192, actions=("skip", "small", "big")).save_pretrained("mine")
    assert "mine may take skip, which is not among --actions" in refused(["evaluate", "--router", "mine"], capsys)
