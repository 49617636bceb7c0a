"""What goes wrong in a run is one line on the terminal, and nothing is lost by it."""

import copy
import errno
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_cli import refused

from duorl.cli import main
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
