"""Jobs on a Ray cluster: two nodes on this machine, which share nothing but Ray with the process that runs them."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from duorl.cli import main
from duorl.runs.channel import Channel, Failed, Files, Result, Said
from duorl.runs.cluster import Needs, OnCluster, _own_modules
from duorl.runs.interrupts import Interrupted
from duorl.runs.jobs import JobError
from duorl.runs.mirror import Change, Mirror, apply, gathered, scatter
from duorl.runs.remote import RUN

NEEDS_RAY = 'needs pip install -e ".[ray]"'


# What travels


def test_a_mirror_tells_what_changed_and_where_growing_files_grew(tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    scatter({"a/known.txt": b"known", "gone.txt": b"gone", "events.out.tfevents.1": b"begin"}, there)
    scatter(gathered(there, [there]), here)
    mirror = Mirror(there)
    assert mirror.changes() == []
    (there / "a" / "known.txt").write_bytes(b"changed")
    (there / "gone.txt").unlink()
    (there / "events.out.tfevents.1").open("ab").write(b", and on")
    (there / "new").mkdir()
    (there / "new" / ".part-7-file").write_bytes(b"half")
    changes = mirror.changes()
    assert Change("events.out.tfevents.1", b", and on", 5) in changes and len(changes) == 3
    apply(changes, here)
    assert gathered(here, [here]) == {"a/known.txt": b"changed", "events.out.tfevents.1": b"begin, and on"}
    assert mirror.changes() == []


@pytest.mark.parametrize("path", ["../outside", "/outside", "a/../../outside"])
def test_a_mirror_stays_in_its_folder(path, tmp_path):
    with pytest.raises(ValueError, match="is outside of the run's folder"):
        apply([Change(path, b"")], tmp_path / "run")
    assert not (tmp_path / "outside").exists()


def test_own_modules_are_found_while_another_thread_imports(tmp_path, monkeypatch):
    class Growing(dict):
        def items(self):
            for name in self:
                yield name, self[name]
                self.setdefault("imported_meanwhile", sys)

    own = ModuleType("own")
    own.__file__ = str(tmp_path / "own.py")
    monkeypatch.setattr(sys, "modules", Growing({**sys.modules, "own": own}))
    assert _own_modules(tmp_path) == [tmp_path / "own.py"]


# Stopping


class FakeRay:
    """Tasks that send what a test gives them; it remembers which ones are cancelled."""

    exceptions = SimpleNamespace(RayTaskError=KeyError, RayError=OSError)

    def __init__(self, messages):
        self.messages, self.cancelled, self.flipped = messages, [], 0

    def remote(self, **options):
        return lambda function: SimpleNamespace(remote=lambda *given: self.messages)

    def get(self, message):
        return message

    def cancel(self, task, force):
        self.cancelled.append(task)

    def flip(self):
        self.flipped += 1


def on_fake_cluster(messages, folder):
    """An executor whose only task sends these messages."""
    found = OnCluster.__new__(OnCluster)
    Channel.__init__(found)
    found.ray, found.folder, found.needs, found._inputs = FakeRay(messages), folder, Needs(), {}
    found._running, found._waiting = set(), set()
    found._switch = SimpleNamespace(flip=SimpleNamespace(remote=found.ray.flip))
    return found


@pytest.mark.parametrize(("begun", "at_once"), [(False, False), (True, False), (True, True)])
def test_a_task_without_a_machine_ends_at_once_when_a_run_is_stopped(begun, at_once, tmp_path):
    """One that has a machine saves first; only a second signal ends it."""

    def messages():
        if begun:
            yield Files([], Path(RUN))
            yield Said({"line": "has begun"})
        executor.stop()
        executor.stop(at_once=at_once)

    executor = on_fake_cluster(task := messages(), tmp_path)
    with pytest.raises(Interrupted):
        executor.execute(print, {}, lambda **said: None)
    assert executor.ray.cancelled == ([] if begun and not at_once else [task])
    assert executor.ray.flipped == 1 and not executor._running and not executor._waiting
    with pytest.raises(Interrupted):  # none is handed to the cluster any more
        executor.execute(print, {}, lambda **said: None)


def test_a_task_whose_messages_cannot_be_shown_is_ended(tmp_path):
    def full(**said):
        raise OSError(errno.ENOSPC, "No space left on device")

    executor = on_fake_cluster(task := iter([Said({"line": "has begun"}), Result({})]), tmp_path)
    with pytest.raises(OSError, match="No space left"):
        executor.execute(print, {}, full)
    assert executor.ray.cancelled == [task] and not executor._running


def test_what_changed_elsewhere_is_written_into_the_run_here(tmp_path):
    said = [Files([Change("a/x.txt", b"changed")], Path(RUN)), Failed(f"{RUN}/a/x.txt is broken", "in x")]
    with pytest.raises(JobError) as failed:
        on_fake_cluster(iter(said), tmp_path).execute(print, {}, lambda **said: None)
    assert (tmp_path / "a" / "x.txt").read_bytes() == b"changed"
    assert failed.value.line == f"{tmp_path}/a/x.txt is broken"


# On a cluster

REWARD = """
import time

import duorl


class Own(duorl.rewards.Reward):
    def __init__(self, price: float = 0.2):
        self.price = price

    def __call__(self, step):
        time.sleep(0.2)  # a training takes 16 seconds, however fast the machine
        return step.gain - self.price * step.compute
"""
SIZE = ["--evaluation.windows=2", "--evaluation.fixed_windows=2", "--evaluation.final_windows=2"]
SIZE += ["--evaluation.reference_windows=1", "--env.window=32", "--validations=2", "--total_decisions=40000"]
COMPARE = ["compare", "--agents={A: REINFORCE, B: PPO}", "--rivals=[]", "--reward=own.Own", "--corpus=texts/*.txt"]
COMPARE += [*SIZE, "--threads=1", "--save_every=0.5"]
ORACLE = ["oracle", "--corpus=texts/*.txt", '--actions=["skip", "small", "big"]', "--threads=1"]
ORACLE += ["--window=16", "--windows=6", "--shard=1"]


@pytest.fixture(scope="module")
def cluster():
    pytest.importorskip("ray", reason=NEEDS_RAY)
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100_000_000})
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_corpus):
    """A user's folder, with a reward and a text, and the run that one machine makes."""
    place = tmp_path_factory.mktemp("user")
    (place / "own.py").write_text(REWARD)
    (place / "texts").mkdir()
    text = Path(small_corpus).read_text()
    for part in range(8):
        (place / "texts" / f"{part}.txt").write_text(text[part * len(text) // 8 : (part + 1) * len(text) // 8])
    duorl(place, "--processes=2", "--out=alone").wait(300)
    return place


def duorl(place, *options, command=COMPARE):
    """A command in a process of its own."""
    alone = {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONUNBUFFERED": "1"}
    words = [sys.executable, "-c", "from duorl.cli import main; main()", *command, *options]
    return subprocess.Popen(words, cwd=place, env=os.environ | alone, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def routers(run):
    return {path.parent.name: path.read_bytes() for path in run.glob("routers/*/router.safetensors")}


def until(found, process, seconds=300):
    """Wait for something that a process does."""
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end and process.poll() is None, process.stdout.read().decode()
        time.sleep(0.1)


@pytest.mark.slow
def test_a_lost_machine_costs_nothing_but_time(cluster, folder):
    second = cluster.add_node(num_cpus=1, object_store_memory=100_000_000)
    process = duorl(folder, f"--cluster={cluster.address}", "--out=lost")
    checkpoints = [folder / "lost" / "routers" / name / "checkpoint.safetensors" for name in "AB"]
    until(lambda: all(path.exists() for path in checkpoints), process)
    cluster.remove_node(second, allow_graceful=False)
    said = process.communicate(timeout=300)[0].decode()
    assert process.returncode == 0, said
    assert "a machine was lost" in said
    for name in "AB":  # the curve of the training that went on has its first part too
        curve = EventAccumulator(str(folder / "lost" / "tensorboard" / name)).Reload().Scalars("rollout/return")
        assert [point.step for point in curve] == [4096 * (update + 1) for update in range(len(curve))]
    assert routers(folder / "lost") == routers(folder / "alone") and len(routers(folder / "alone")) == 2


@pytest.mark.slow
def test_a_stopped_run_saves_and_goes_on(cluster, folder):
    process = duorl(folder, f"--cluster={cluster.address}", "--out=stopped")
    until((folder / "stopped" / "routers" / "A" / "checkpoint.safetensors").exists, process)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=100)[0].decode()
    assert process.returncode == 143 and "--resume" in said, said
    damaged = folder / "stopped" / "routers" / "A" / "checkpoint.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    process = duorl(folder, f"--cluster={cluster.address}", "--out=stopped", "--resume")
    said = process.communicate(timeout=300)[0].decode()  # its path is that of this machine
    assert process.returncode == 1 and f"{damaged.relative_to(folder)} is broken or not a checkpoint" in said, said
    damaged.unlink()
    process = duorl(folder, f"--cluster={cluster.address}", "--out=stopped", "--resume")
    said = process.communicate(timeout=300)[0].decode()
    assert process.returncode == 0, said
    assert routers(folder / "stopped") == routers(folder / "alone")


@pytest.mark.slow
def test_a_search_in_shards_is_that_of_one_process(cluster, folder):
    """Also if a machine is lost."""
    duorl(folder, "--processes=1", "--out=search", command=ORACLE).wait(300)
    second = cluster.add_node(num_cpus=1, object_store_memory=100_000_000)
    process = duorl(folder, f"--cluster={cluster.address}", "--out=searched", command=ORACLE)
    until(lambda: any((folder / "searched" / "shards").glob("*/result.json")), process)
    cluster.remove_node(second, allow_graceful=False)
    said = process.communicate(timeout=300)[0].decode()
    assert process.returncode == 0 and "a machine was lost" in said, said
    tables = [(folder / run / "tokens.csv").read_text() for run in ("search", "searched")]
    assert tables[0] == tables[1] and len(tables[0].splitlines()) > 6 * 16
    numbers = [json.loads((folder / run / "oracle.json").read_text()) for run in ("search", "searched")]
    assert [found.pop("settings")["shard"] for found in numbers] == [1, 1] and numbers[0] == numbers[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--cluster=127.0.0.1:1"], "no Ray cluster answers at 127.0.0.1:1: start one with"),
        (["--cluster=nowhere"], "cluster must be auto or HOST:PORT, not 'nowhere'"),
        (["--cluster={address}", "--threads=99"], "a job asks for CPU 99, memory "),
    ],
)
def test_a_cluster_that_cannot_do_it_is_refused(options, said, cluster, folder):
    process = duorl(folder, *(option.format(address=cluster.address) for option in options), "--out=refused")
    printed = process.communicate(timeout=200)[0].decode()
    assert process.returncode == 2 and said in printed, printed
    assert not (folder / "refused").exists()


def test_a_cluster_without_ray_is_refused(small_corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("duorl.runs.cluster.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        main(["compare", "--agents={A: REINFORCE}", f"--corpus={small_corpus}", *SIZE, "--cluster=auto", "--out=run"])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and 'a cluster needs Ray: pip install "ray' in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
