"""Runs: checkpoints, folders, interrupts, jobs, the journal."""

import errno
import itertools
import math
import multiprocessing
import os
import signal
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

from duorl import files
from duorl.cli.parser import complete, parse
from duorl.runs import channel, checkpoints, folders, interrupts, jobs, processes
from duorl.runs.journal import Journal
from duorl.runs.mirror import Change
from duorl.version import VERSION

TORCH_TYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)
TENSORS = st.tuples(SHAPES, st.sampled_from(TORCH_TYPES), st.integers(0, 99)).map(
    lambda drawn: (torch.randn(drawn[0], generator=torch.Generator().manual_seed(drawn[2])) * 3).to(drawn[1])
)
ARRAYS = st.tuples(SHAPES, st.sampled_from(["f8", "u8", "i4", "?", "f2", "c16", "U3", ">i4"])).map(
    lambda drawn: np.arange(math.prod(drawn[0])).reshape(drawn[0]).astype(drawn[1])
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(2**63, 2**130)
    | st.floats()
    | st.text()
    | TENSORS
    | ARRAYS
    | ARRAYS.map(lambda array: array.flatten()[0] if array.size else np.float32(0.1))
)
KEYS = st.text() | st.integers() | st.tuples(st.integers(), st.text())
STATES = st.recursive(
    LEAVES, lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(KEYS, inner), max_leaves=12
)


def same(one, other) -> bool:
    """Equal to the bit, kinds included."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, (np.ndarray, np.generic)):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return repr(one) == repr(other)


@given(STATES)
@settings(deadline=None, max_examples=60)
def test_a_checkpoint_gives_back_what_was_saved(tmp_path_factory, state):
    path = tmp_path_factory.mktemp("state") / "x.safetensors"
    checkpoints.save(path, state)
    assert same(checkpoints.load(path), state)
    assert list(path.parent.iterdir()) == [path]


def test_a_checkpoint_holds_optimizers_and_random_states(tmp_path):
    weight = torch.nn.Parameter(torch.randn(3))
    optimizer = torch.optim.Adam([weight], lr=0.1)
    weight.sum().backward()
    optimizer.step()
    generator, bits = torch.Generator().manual_seed(1), np.random.default_rng(2)
    shared = torch.arange(6)
    state = {
        "optimizer": optimizer.state_dict(),
        "torch": generator.get_state(),
        "numpy": bits.bit_generator.state,
        "views": [shared, shared[::2], shared],
    }
    checkpoints.save(tmp_path / "x", state)
    loaded = checkpoints.load(tmp_path / "x")
    assert same(loaded["optimizer"], optimizer.state_dict()) and same(loaded["views"], state["views"])
    bits.bit_generator.state = loaded["numpy"]
    assert bits.random() == np.random.default_rng(2).random()


@pytest.mark.parametrize("keep", [0, 7, 40, -1])
def test_a_broken_checkpoint_is_named(tmp_path, keep):
    path = tmp_path / "broken.safetensors"
    checkpoints.save(path, {"a": torch.arange(5), "b": 1.5})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"broken\.safetensors is broken"):
        checkpoints.load(path)


@pytest.mark.parametrize("bits", [0x01, 0xFF])
def test_a_checkpoint_with_a_changed_byte_is_broken(tmp_path, bits):
    path = tmp_path / "x.safetensors"
    checkpoints.save(path, {"a": torch.arange(3), "b": np.ones(2), "c": 1.5})
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ bits]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="is broken or not a checkpoint: delete it"):
            checkpoints.load(path)


def test_a_checkpoint_refuses_what_it_cannot_hold(tmp_path):
    with pytest.raises(TypeError, match=r"state\['a'\]\[1\] is a set"):
        checkpoints.save(tmp_path / "x", {"a": [1, {2}]})
    assert not any(tmp_path.iterdir())


def test_a_checkpoint_has_the_version_that_saved_it(tmp_path, monkeypatch):
    checkpoints.save(tmp_path / "x", {"a": torch.arange(3)})
    assert checkpoints.version(tmp_path / "x") == VERSION
    monkeypatch.setattr(checkpoints, "VERSION", "9.1")
    checkpoints.save(tmp_path / "y", {"a": torch.arange(3)})
    assert checkpoints.version(tmp_path / "y") == "9.1" and same(
        *map(checkpoints.load, (tmp_path / "x", tmp_path / "y"))
    )
    structure = checkpoints.json.dumps({"dict": [["b", 1]]})  # as releases before 0.3 wrote it
    kept = {"state": structure, "sha256": checkpoints._digest(structure, {})}
    (tmp_path / "old").write_bytes(checkpoints.serialized({}, kept))
    assert checkpoints.load(tmp_path / "old") == {"b": 1} and checkpoints.version(tmp_path / "old") == ""


def _begin_and_die(place):
    with files.temporary_folder() as mine:
        Path(place, "mine").write_text(str(mine))
        with files.writing(Path(place, "run", "a.txt")) as beside, files.writing_folder(Path(place, "s"), last="x"):
            beside.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def test_what_killed_processes_leave_goes(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=_begin_and_die, args=(str(tmp_path),))
    process.start()
    process.join()
    left, mark = Path((tmp_path / "mine").read_text()), tmp_path / "run" / folders.MARK
    assert left.is_dir() and list((tmp_path / "run").glob(".part-*")) and list((tmp_path / "s").glob(".part-*"))
    with files.temporary_folder() as one, files.temporary_folder() as other:  # of the living, each keeps its own
        assert one.is_dir() and other.is_dir() and one != other and not left.exists() and not left.parent.exists()
    assert not one.parent.exists()
    with files.writing_folder(tmp_path / "s", last="x") as beside:
        (beside / "x").touch()
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["x"]
    (tmp_path / "run" / folders.CONFIG).write_text("seed: 0")
    mark.touch()
    with folders.claim(str(tmp_path / "run"), "mine", "seed: 0", resume=True) as folder:
        assert {path.name for path in folder.iterdir()} == {folders.MARK, folders.CONFIG}


def test_a_file_is_whole_or_not_there(tmp_path):
    files.write_text(tmp_path / "a" / "x.json", "old")
    with pytest.raises(KeyboardInterrupt), files.writing(tmp_path / "a" / "x.json") as beside:
        beside.write_text("ne")
        raise KeyboardInterrupt
    assert {path.name: path.read_text() for path in (tmp_path / "a").iterdir()} == {"x.json": "old"}


# --- folders


def claimed(out, **flags):
    with folders.claim(out, "mine", "seed: 0\n", **flags) as folder:
        return folder


def test_free_folders_are_taken_one_by_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        taken = pool.starmap(_claim_here, [(str(tmp_path),)] * 6)
    assert len(set(taken)) == 6 == len(list(Path("runs").iterdir()))


def _claim_here(place):
    os.chdir(place)
    return str(claimed(None))


def test_a_folder_has_one_process_at_a_time(tmp_path):
    out = str(tmp_path / "run")
    with folders.claim(out, "mine", "seed: 0\n"):
        for flags in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(FileExistsError, match=r"another process works in|already holds files"):
                claimed(out, **flags)
        with pytest.raises(FileExistsError, match="another process works in"):
            folders.check(out, resume=True)
    folders.check(out, resume=True)
    with pytest.raises(FileExistsError, match="already holds files"):
        claimed(out)
    (tmp_path / "run" / "kept").touch()
    claimed(out, resume=True)
    assert (tmp_path / "run" / "kept").exists()
    claimed(out, overwrite=True)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".duorl", "config.yaml"]


@pytest.mark.parametrize("left", [[], [".duorl"], [".duorl", ".part-1-config.yaml"]])
@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}])
def test_a_folder_left_half_made_is_begun_anew(tmp_path, left, flags):
    for name in left:
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).touch()
    (tmp_path / "run").mkdir(exist_ok=True)
    folders.check(str(tmp_path / "run"), **flags)
    folder = claimed(str(tmp_path / "run"), **flags)
    assert sorted(path.name for path in folder.iterdir()) == [".duorl", "config.yaml"]


def test_a_folder_left_half_deleted_is_only_overwritten(tmp_path):
    """What it holds may be of a run with other options, or, beside a mark that strayed there, not ours at all."""
    folder = tmp_path / "run"
    (folder / "routers").mkdir(parents=True)
    (folder / ".duorl").touch()
    with pytest.raises(FileExistsError, match="already holds files"):
        claimed(str(folder))
    with pytest.raises(FileNotFoundError, match=r"has no config\.yaml"):
        claimed(str(folder), resume=True)
    assert (folder / "routers").is_dir()
    claimed(str(folder), overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == [".duorl", "config.yaml"]


def test_a_run_that_came_to_nothing_leaves_room_for_another(tmp_path):
    with folders.claim(str(tmp_path / "run"), "evaluate", "a: 1") as folder:
        folders.abandon(folder)
    claimed(str(tmp_path / "run"))


def test_folders_of_others_are_refused(tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").touch()
    for flags, message in (({}, "already holds files"), ({"overwrite": True}, "no run"), ({"resume": True}, "no run")):
        with pytest.raises(FileExistsError, match=message):
            folders.check(str(tmp_path / "other"), **flags)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["config.yaml"]
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        folders.check(str(tmp_path / "gone"), resume=True)
    monkeypatch.chdir(claimed(str(tmp_path / "here")))
    with pytest.raises(FileExistsError, match="is the current folder"):
        folders.check(str(tmp_path / "here"), overwrite=True)


def test_a_run_is_resumed_with_its_own_options(tmp_path):
    folder = claimed(str(tmp_path / "run"))
    folders.check_same_options(str(folder), "seed: 0\nout: elsewhere\nprocesses: 7\n")
    with pytest.raises(ValueError, match="made with seed 0, not 1"):
        folders.check_same_options(str(folder), "seed: 1\n")


def test_a_run_of_an_older_version_goes_on(tmp_path, monkeypatch):
    """Options that it does not have are those of the defaults; its folder says which versions worked in it."""
    out, config = str(tmp_path / "run"), parse("train", ["--seed", "3"])[1]
    older = "".join(line for line in config.splitlines(True) if not line.startswith("validations"))
    older = older.replace("  later_effects: false\n", "").replace("    clip_range: 0.2\n", "")
    assert len(older.splitlines()) == len(config.splitlines()) - 3
    monkeypatch.setattr(folders, "VERSION", "0.1")
    with folders.claim(out, "train", older):
        pass
    monkeypatch.setattr(folders, "VERSION", "0.2")
    again = partial(complete, "train")
    folders.check_same_options(out, config, again)
    with pytest.raises(ValueError, match="made with validations 10, not 3"):
        folders.check_same_options(out, config.replace("validations: 10", "validations: 3"), again)
    with pytest.raises(ValueError, match="made with seed 3, not 4"):
        folders.check_same_options(out, config.replace("seed: 3", "seed: 4"), again)
    for _ in range(2):
        with folders.claim(out, "train", config, resume=True):
            assert folders.versions(out) == ["0.1", "0.2"]
    with folders.claim(out, "train", f"{older}gone: 1\n", overwrite=True):
        assert folders.versions(out) == ["0.2"]
    with pytest.raises(ValueError, match=r"config\.yaml is of DuoRL 0\.2, and .* cannot read it: .*gone"):
        folders.check_same_options(out, config, again)


def test_a_resumed_run_keeps_its_configuration_but_for_what_may_change(tmp_path):
    first = "until: choose\nseed: 0\nthreads: 1\nout: run\nresume: false\n"
    for config in (first, "until: distil\nseed: 0\nthreads: 1\nout: elsewhere\nresume: true\n"):
        with folders.claim(str(tmp_path / "run"), "mine", config, resume=True):
            pass
    assert (tmp_path / "run" / "config.yaml").read_text() == first.replace("choose", "distil")


# --- interrupts


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_raises_at_once_or_at_the_next_safe_point(signum, code):
    with interrupts.listening():
        with pytest.raises(interrupts.Interrupted) as stopped:
            os.kill(os.getpid(), signum)
            time.sleep(1)
        assert stopped.value.exit_code == code
    with interrupts.listening():
        passed = []
        with pytest.raises(interrupts.Interrupted), interrupts.deferred():
            interrupts.check()
            os.kill(os.getpid(), signum)
            passed.append(interrupts.pending())
            interrupts.check()
            passed.append("never")
        assert passed == [True]
        with pytest.raises(interrupts.Interrupted), interrupts.deferred():
            os.kill(os.getpid(), signum)  # the second
            passed.append("never")
        assert passed == [True]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


# --- jobs


def answer(number, tell):
    tell(completed=number, total=2)
    return {"answer": number}


def fail(tell):
    raise ValueError("no\nway")


def die(tell):
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for_signal(place, tell):
    with interrupts.deferred():
        Path(place).touch()
        while not interrupts.pending():
            time.sleep(0.01)
        Path(place).write_text("saved")
    return {}


def sleep(place, tell):
    Path(place).write_text(str(os.getpid()))
    time.sleep(60)
    return {}


def make_jobs(folder):
    return [
        jobs.Job("first", folder / "first", answer, {"number": 1}),
        jobs.Job("bad", folder / "bad", fail),
        jobs.Job("after bad", folder / "after-bad", answer, {"number": 2}, after=("bad",)),
        jobs.Job("last", folder / "last", answer, {"number": 2}, after=("first",)),
    ]


@pytest.mark.parametrize("slots", [1, 2])
def test_a_failed_job_is_told_and_the_others_finish(tmp_path, slots):
    planned = make_jobs(tmp_path)
    if slots == 2:
        planned.append(jobs.Job("dead", tmp_path / "dead", die))
    said = []
    left = jobs.run(planned, jobs.executor(slots, 1), tmp_path, lambda job, words: said.append((job.name, words)))
    assert [job.name for job in left] == ["bad", "after bad", "dead"][: slots + 1]
    assert [job.result for job in planned if job.finished] == [{"answer": 1}, {"answer": 2}]
    errors = {name: words["error"] for name, words in said if "error" in words}
    assert errors["bad"] == "ValueError: no way" and "after bad" not in errors
    assert "in fail" in (tmp_path / "errors" / "bad.txt").read_text()
    if slots == 2:
        assert "SIGKILL" in errors["dead"]
    again = []
    jobs.run(planned, jobs.executor(1, 1), tmp_path, lambda job, words: again.append(job.name)) if slots == 1 else None
    assert "first" not in again


def tell_and_sleep(place, tell):
    tell(line="has begun")
    return sleep(place, tell)


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("kind", [OSError(errno.ENOSPC, "No space left on device"), BrokenPipeError()])
def test_a_run_ends_if_its_messages_cannot_be_shown(tmp_path, slots, kind):
    """Standard output on a full disk, or a closed pipe; the processes of other jobs end too."""

    def show(job, words):
        if "line" in words or "error" in words:
            until(lambda: slots == 1 or (tmp_path / "pid").exists())
            raise kind

    planned = [
        jobs.Job("asleep", tmp_path / "s", sleep, {"place": str(tmp_path / "pid")}),
        jobs.Job("telling", tmp_path / "t", tell_and_sleep, {"place": str(tmp_path / "other")}),
    ]
    begun = time.monotonic()
    with pytest.raises(type(kind)):
        jobs.run(planned[2 - slots :], jobs.executor(slots, 1), tmp_path, show)
    assert time.monotonic() - begun < 30
    if slots == 2:
        assert not _alive(int((tmp_path / "pid").read_text()))
    assert not any(job.finished for job in planned)


class Scripted(channel.Channel):
    """A transport whose jobs say what a test gives them."""

    lives, slots = 3, 2

    def __init__(self, *scripts):
        super().__init__()
        self.scripts, self.closed = list(scripts), 0

    def messages(self, function, arguments):
        try:
            yield from self.scripts.pop(0)
        finally:
            self.closed += 1

    def stop(self, *, at_once=False):
        self.stopping = True


def heard(*scripts):
    """What a job on such a transport returns, and what it said."""
    said = []
    return Scripted(*scripts).execute(answer, {}, lambda **words: said.append(words)), said


def test_a_job_goes_on_where_a_place_is_lost_and_fails_after_the_last():
    lost, result = channel.Lost("a machine was lost"), channel.Result({"answer": 1})
    again = {"line": "a machine was lost: its job goes on from the last checkpoint"}
    found, said = heard([channel.Said({"completed": 1}), lost], [lost], [result])
    assert found == {"answer": 1} and said == [{"completed": 1}, again, again]
    assert heard([], [result])[1] == [{"line": "it ended without a result: its job goes on from the last checkpoint"}]
    with pytest.raises(jobs.JobError, match="a machine was lost, 3 times"):
        heard([lost], [lost], [lost])
    with pytest.raises(jobs.JobError, match="no way") as failed:
        heard([channel.Failed("no way", "in x")], [result])
    assert failed.value.details == "in x"
    with pytest.raises(interrupts.Interrupted) as stopped:
        heard([channel.Stopped(signal.SIGINT)], [result])
    assert stopped.value.signum == signal.SIGINT


def test_files_that_cannot_be_written_here_fail_their_job(tmp_path, monkeypatch):
    change = channel.Files([Change("a.txt", b"changed")], tmp_path)
    assert heard([change, channel.Result({})]) == ({}, [])
    assert (tmp_path / "a.txt").read_bytes() == b"changed"

    def full(changes, folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(channel, "apply", full)
    place = Scripted([change, channel.Result({})])
    with pytest.raises(jobs.JobError, match="the disk is full"):
        place.execute(answer, {}, lambda **words: None)
    assert place.closed == 1


def _command(folder):
    """A command whose job waits for a signal, and says how it ended."""
    planned = [jobs.Job(name, Path(folder, name), wait_for_signal, {"place": f"{folder}/{name}.txt"}) for name in "ab"]
    try:
        with interrupts.listening():
            jobs.run(planned, processes.SideBySide(2, 1), Path(folder), lambda job, words: None)
    except interrupts.Interrupted as stop:
        os._exit(stop.exit_code)


def _orphans(folder):
    planned = [jobs.Job("s", Path(folder, "s"), sleep, {"place": f"{folder}/pid"})] * 1
    jobs.run(planned, processes.SideBySide(2, 1), Path(folder), lambda job, words: None)


def until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_command_has_its_jobs_save(tmp_path, signum):
    command = multiprocessing.get_context("spawn").Process(target=_command, args=(str(tmp_path),))
    command.start()
    until(lambda: (tmp_path / "a.txt").exists() and (tmp_path / "b.txt").exists())
    os.kill(command.pid, signum)
    command.join(30)
    assert command.exitcode == 128 + signum
    assert [(tmp_path / f"{name}.txt").read_text() for name in "ab"] == ["saved", "saved"]


def test_jobs_end_with_a_command_that_is_killed(tmp_path):
    command = multiprocessing.get_context("spawn").Process(target=_orphans, args=(str(tmp_path),))
    command.start()
    until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    worker = int((tmp_path / "pid").read_text())
    command.kill()
    command.join()
    until(lambda: not _alive(worker), 10)


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


# --- journal


def curve(folder):
    return [(point.step, point.value) for point in EventAccumulator(str(folder)).Reload().Scalars("train/loss")]


@pytest.mark.parametrize("torn", [False, True])
def test_a_journal_that_goes_on_shows_one_curve(tmp_path, torn, monkeypatch):
    # Files are read in the order of their names, which begin with the second: in life, another process is later.
    monkeypatch.setattr(time, "time", map(float, itertools.count(1_800_000_000)).__next__)

    def write(folder, steps, decisions=0):
        journal = Journal(folder, decisions)
        for step in steps:
            journal.scalars(step, {"train/loss": step / 7})
        journal.hparams(max(steps), {"seed": 1}, {"train/loss": 0.0})
        journal.close()

    write(tmp_path / "whole", range(10, 100, 10))
    write(tmp_path / "stopped", range(10, 80, 10))
    if torn:
        (file,) = (tmp_path / "stopped").iterdir()
        file.write_bytes(file.read_bytes()[:-150])
    write(tmp_path / "stopped", range(60, 100, 10), decisions=50)
    assert curve(tmp_path / "stopped") == curve(tmp_path / "whole")


def test_a_journal_that_cannot_write_says_so_where_it_is_used(tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    met = []
    monkeypatch.setattr(threading, "excepthook", met.append)
    hook, journal = threading.excepthook, Journal(tmp_path)
    monkeypatch.setattr(RecordWriter, "write", full)
    with pytest.raises(OSError, match="No space left"):
        Journal(tmp_path)
    with pytest.raises(OSError, match="No space left"):
        journal.scalars(10, {"train/loss": 0.5})
        journal.flush()
    with pytest.raises(OSError, match="No space left"):
        journal.close()
    assert threading.excepthook is hook and met == []  # a thread's hook prints its traceback


def test_the_journal_leaves_the_errors_of_other_threads_alone(tmp_path, monkeypatch):
    met = []
    monkeypatch.setattr(threading, "excepthook", lambda what: met.append(what.exc_value))
    journal = Journal(tmp_path)
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    journal.close()
    assert [type(error) for error in met] == [ZeroDivisionError]
