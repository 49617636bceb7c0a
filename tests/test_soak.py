"""What `benchmarks/soak.py` does to runs, and what it takes for a broken promise."""

import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from benchmarks import disturbances, soak
from duorl.runs import checkpoints


@pytest.mark.parametrize("damage", soak._DAMAGES.values(), ids=soak._DAMAGES)
def test_every_damage_is_found(damage, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    for seed in range(20):
        checkpoints.save(path, {"weights": torch.arange(1000.0), "step": 7})
        damage(path, random.Random(seed))
        with pytest.raises(ValueError, match="is broken or not a checkpoint: delete it to start anew"):
            checkpoints.load(path)


def test_only_checkpoints_of_jobs_that_are_not_finished_are_damaged(tmp_path):
    for name in ("running", "finished"):
        checkpoints.save(tmp_path / name / "checkpoint.safetensors", {"step": 7})
    (tmp_path / "finished" / "result.json").touch()
    assert disturbances.unfinished(tmp_path) == [tmp_path / "running" / "checkpoint.safetensors"]


def test_a_damaged_checkpoint_is_not_damaged_again(tmp_path):
    path = tmp_path / "run" / "checkpoint.safetensors"
    checkpoints.save(path, {"step": 7})
    run = soak.Run("run", damaged={path})
    here = SimpleNamespace(folder=tmp_path, draw=random.Random(0))
    assert soak.Soak._damage(here, SimpleNamespace(run=run), "empty checkpoint") is None
    assert path.stat().st_size > 0


def test_workers_are_found_among_the_processes_that_this_one_started():
    waits = [sys.executable, "-c", "import time; time.sleep(60)"]
    started = [subprocess.Popen([*waits, word]) for word in ("spawn_main", "other")]
    try:
        assert {process.pid for process in started} <= set(disturbances.descendants(os.getpid()))
        assert started[0].pid in disturbances.workers(os.getpid())
        assert started[1].pid not in disturbances.workers(os.getpid())
    finally:
        for process in started:
            process.kill()
            process.wait()


def test_a_disk_is_filled_and_freed(tmp_path):
    disk = disturbances.Disk(tmp_path / "disk", 1)
    if not disk.small:
        pytest.skip("this user may not mount a disk")
    try:
        disk.fill()
        with pytest.raises(OSError, match="No space left"):
            (disk.folder / "more").write_bytes(bytes(5000))
        disk.free()
        (disk.folder / "more").write_bytes(bytes(5000))
    finally:
        disk.close()
    assert not any(disk.folder.iterdir())


def test_differences_of_weights_tables_and_remains_are_named_and_times_are_none(tmp_path):
    def run(name, weight, loss, speed, big, *remains):
        for path, content in [("routers/A/router.safetensors", weight), *((path, "") for path in remains)]:
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_text(content)
        rows = [{"router": "A", "loss": loss, "tokens_per_second": speed}, {"router": "B", "loss": 1.0}]
        found = {"rows": rows, "frontiers": {"fixed": [big]}}
        (tmp_path / name / "comparison.json").write_text(json.dumps(found))
        return soak.differences(tmp_path / "alone", tmp_path / name)

    assert run("alone", "w", 2.0, 5, 1) == run("same", "w", 2.0, 6, 1) == []
    assert run("other", "v", 2.5, 5, 2, "routers/A/checkpoint.safetensors", "errors/A.txt") == [
        "routers/A/router.safetensors",
        "table: A",
        "frontiers",
        "left: routers/A/checkpoint.safetensors",
        "left: errors/A.txt",
    ]


STOPPED, LEFT = "duorl: stopped; go on with: duorl compare --resume", "A failed: the disk is full (it is)\n"
FAILED = "duorl: error: 1 of 2 jobs are not finished: A; go on with: duorl compare --resume"


@pytest.mark.parametrize(
    ("code", "signum", "excuses", "said", "broken"),
    [
        (0, None, set(), "wrote run/", []),
        (143, signal.SIGTERM, set(), STOPPED, []),
        (-9, signal.SIGKILL, set(), "half a li", []),
        (1, None, {"the disk is full"}, LEFT + FAILED, []),
        (143, signal.SIGINT, set(), STOPPED, [f"exit code 143: {STOPPED}"]),
        (130, signal.SIGINT, set(), "", ["stopped without the command that goes on: "]),
        (1, None, set(), FAILED, [f"exit code 1: {FAILED}"]),
        (1, None, {"the disk is full"}, "it", ["exit code 1 without the command that goes on: it"]),
        (0, None, {"the disk is full"}, "Traceback (most recent call last):\nit", ["a traceback"]),
        (1, None, {"its process died"}, LEFT + FAILED, [LEFT.strip()]),
    ],
)
def test_a_broken_promise_is_told_from_exit_code_and_messages(code, signum, excuses, said, broken, tmp_path):
    process = subprocess.Popen(["true"])
    process.wait()
    process.returncode = code
    (tmp_path / "log").write_text(said)
    visit = soak.Visit(soak.Run("run"), process, tmp_path / "log", excuses, signum)
    assert visit.broken() == broken


def test_the_table_counts_disturbances_and_the_runs_that_met_them():
    runs = [soak.Run("0", Counter(a=2, b=1)), soak.Run("1", Counter(a=1), different=["x"], broken=["y"]), soak.Run("2")]
    found = soak.rows(["a", "b", "c"], runs)
    assert [list(row.values()) for row in found] == [
        ["a", 3, 2, 1, 1],
        ["b", 1, 1, 0, 0],
        ["c", 0, 0, 0, 0],
        ["all", 4, 3, 1, 1],
    ]
    assert "| a | 3 | 2 | 1 | 1 |" in soak.markdown(found)
