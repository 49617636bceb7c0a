"""Runs that are killed and gone on with end as if nothing had happened. `benchmarks/kills.py` does it at length."""

import random
import signal

import pytest
import torch

from benchmarks import kills
from duorl.cli import main

# What comes after the trainings is not compared, and short.
_SHORT = kills._SMALL.replace("final_windows: 2", "final_windows: 2, baseline: greedy, bound: none") + "rivals: []\n"
FEW = {
    "train": ("train", _SHORT + "target_compute: 0.5\ntotal_decisions: 4000"),
    "compare": ("compare", _SHORT + "agents: {DQN: DQN, Soft: Soft}\nprocesses: 1\ntotal_decisions: 4000"),
    "pretrain": ("pretrain", kills._PRETRAIN),
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the configurations; one thread, as in the process that is killed."""
    monkeypatch.setattr(kills, "RUNS", FEW)
    monkeypatch.chdir(tmp_path)
    kills.prepare(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "signum"), [("train", signal.SIGKILL), ("compare", signal.SIGTERM), ("pretrain", signal.SIGINT)]
)
def test_a_killed_run_ends_as_one_left_alone(name, signum, here):
    """Only what is killed needs a process of its own: starting one takes longer than its training."""
    code = kills.kill_in_training(name, "killed", here, signum, random.Random(1).uniform(0.0, 1.5))
    assert code in ({signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[signum], 0)
    if code > 0:
        assert "go on with: " in (here / "killed.log").read_text()
    for words in (kills.command(name, "whole"), kills.command(name, "killed", "--resume")):
        main(words[3:])
    assert kills.differences(here / "whole", here / "killed") == []
