"""Hours of `duorl compare` with disturbances: does every run end as the one left alone? A table of the page Long runs.

    python -m benchmarks.soak --minutes 120 --seed 0 --cluster --out docs/results/soak.json
    python -m benchmarks.soak --minutes 6 --scale 0.1 --every 20 30           # a short trial, without a cluster

One run is left alone. Then the same run is made again and again. Every minute or two something happens to it: a signal,
a killed worker, a full disk, a damaged checkpoint. With `--cluster`, every second run is on a Ray cluster of two nodes,
and loses machines. After each end it goes on with `--resume`, and after a message about a damaged checkpoint, what the
message says is done. Each run must keep what docs/how-to/interruptions.md promises, and end with weights, curves and
table of the run that was left alone.

The runs lie on a small disk of their own, which takes the right to mount one. Without it, full disks are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import kills
from benchmarks.disturbances import Disk, Machines, empty, flip, truncate, unfinished, workers
from benchmarks.record import record
from duorl.markdown import grid
from duorl.runs.jobs import CHECKPOINT

_CONFIG = """
corpus: [text.txt]
env: {{windows_per_batch: 2, group_size: 2, window: 64}}
evaluation: {evaluation}
validations: 5
save_every: 5
processes: 2
seeds: 2
threads: 1
total_decisions: {decisions}
agents:
  PPO: PPO
  DQN: {{class_path: DQN, init_args: {{buffer_size: 8000, gradient_steps: 2}}}}
  REINFORCE: REINFORCE
  ReinMax: ReinMax
rivals:
  supervised: {{class_path: Supervised, init_args: {{windows: 1, epochs: 3}}}}
  soft: {{class_path: Soft, init_args: {{updates: {updates}}}}}
"""
_DECISIONS, _UPDATES = 400_000, 400  # at scale 1
_MEGABYTES = 256
_FULL = (10.0, 20.0)  # seconds for which a disk is full
_STARTING = 15.0  # seconds in which nothing happens to a process: Python is starting
_ENDING = 300.0  # seconds after which a signal must have had its effect
_LONGEST = 3600.0  # seconds for which a process may run
_VISITS = 200  # starts of one run, after which it will not end any more
_BROKEN = re.compile(r"(\S+) is broken or not a checkpoint: delete it to start anew")
_TIMED = ("tokens_per_second", "tokens_per_second_interval")
_SIGNALS = {f"{signum.name} to the main process": signum for signum in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)}
_DAMAGES = {"truncated checkpoint": truncate, "flipped bytes in a checkpoint": flip, "empty checkpoint": empty}


@dataclass
class Run:
    """One run, with all that happened to it.

    Args:
        name: its folder.
        met: how often it met each kind of disturbance.
        damaged: checkpoints that are damaged.
        starts: how often its command was started.
        broken: promises that were not kept.
        different: what differs from the run that was left alone.
        address: of the cluster that does its jobs; None: processes of this machine do them.
    """

    name: str
    met: Counter[str] = field(default_factory=Counter)
    damaged: set[Path] = field(default_factory=set)
    starts: int = 0
    broken: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    address: str | None = None


@dataclass
class Visit:
    """One start of a run's command, until its process ends.

    Args:
        run: the run.
        process: the process.
        log: what it says.
        excuses: parts of messages with which jobs may fail.
        signum: the signal that it got.
    """

    run: Run
    process: subprocess.Popen
    log: Path
    excuses: set[str] = field(default_factory=set)
    signum: int | None = None
    began: float = field(default_factory=time.monotonic)

    @property
    def age(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.began

    def end(self, signum: int) -> None:
        """Send a signal, and wait for the end; a process that does not end is killed."""
        self.signum = signum
        self.process.send_signal(signum)
        try:
            self.process.wait(_ENDING)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def broken(self) -> list[str]:
        """The promises that its exit code and its messages do not keep."""
        text, code = self.log.read_text(), self.process.returncode
        lines = text.splitlines()
        last = lines[-1] if lines else ""
        found = [] if code in self._codes() else [f"exit code {code}: {last}"]
        if code == 1 and not (last.startswith("duorl: error: ") and "go on with: " in last):
            found.append(f"exit code 1 without the command that goes on: {last}")
        if code > 128 and not last.startswith("duorl: stopped; go on with: "):
            found.append(f"stopped without the command that goes on: {last}")
        found += ["a traceback"] * ("Traceback" in text)
        failed = [line for line in lines if " failed: " in line]
        return found + [line for line in failed if not any(excuse in line for excuse in self.excuses)]

    def _codes(self) -> set[int]:
        codes = {0} | ({1} if self.excuses else set())
        if self.signum is None:
            return codes
        return codes | {-self.signum if self.signum == signal.SIGKILL else 128 + self.signum}


class Soak:
    """Runs with disturbances.

    Args:
        folder: an empty folder.
        scale: size of the runs.
        every: shortest and longest time between two disturbances, in seconds.
        seed: of the disturbances.
        cluster: whether every second run's jobs run on a cluster.
    """

    def __init__(self, folder: Path, scale: float, every: tuple[float, float], seed: int, cluster: bool):
        self.folder, self.every, self.draw = folder, every, random.Random(seed)
        sizes = {"decisions": int(_DECISIONS * scale), "updates": max(1, int(_UPDATES * scale))}
        kills.prepare(folder, {"soak": ("compare", _CONFIG.format(evaluation=kills._EVALUATION, **sizes))})
        self.disk = Disk(folder / "disk", _MEGABYTES)
        self.machines = Machines() if cluster else None
        self.kinds = self._kinds()
        self.deck: list[str] = []
        self.visit: Visit | None = None
        self.due = 0.0  # when something happens next
        self.began, self.events = time.monotonic(), list[str]()
        if not self.disk.small:
            self.note("left out: a full disk, because this user may not mount one")

    def _kinds(self) -> dict[str, Callable[[Visit, str], str | None]]:
        kinds: dict[str, Callable[[Visit, str], str | None]] = dict.fromkeys(_SIGNALS, self._signal)
        kinds["SIGKILL to a worker"] = self._kill_worker
        kinds |= dict.fromkeys(_DAMAGES, self._damage)
        if self.disk.small:
            kinds["full disk"] = self._fill
        if self.machines:
            kinds["lost machine"] = self._lose
        return kinds

    def _next(self) -> float:
        return time.monotonic() + self.draw.uniform(*self.every)

    def close(self) -> None:
        """End what still runs, and release the disk and the cluster."""
        if self.visit and self.visit.process.poll() is None:
            self.visit.end(signal.SIGKILL)
        if self.machines:
            self.machines.close()
        self.disk.close()

    def note(self, event: str) -> None:
        """Keep an event with its time."""
        seconds = int(time.monotonic() - self.began)
        self.events.append(f"{seconds // 60:3d}:{seconds % 60:02d} {event}")
        print(self.events[-1], file=sys.stderr, flush=True)

    def alone(self) -> float:
        """Make the run that is left alone; returns the seconds."""
        visit = self._start(Run("alone"))
        if visit.process.wait() != 0:
            raise RuntimeError(f"it ended with {visit.process.returncode}:\n{visit.log.read_text()[-2000:]}")
        self.note(f"the run that is left alone took {visit.age:.0f} s")
        return visit.age

    def disturbed(self, number: int, until: float) -> Run:
        """Make a run, disturb it until some time, and compare it."""
        run = Run(f"disk/{number}", address=self.machines.address if self.machines and number % 2 == 0 else None)
        self.note(f"run {number} begins{' on the cluster' if run.address else ''}")
        self.due = self.due or self._next()
        while run.starts < _VISITS:
            visit = self._start(run)
            self._watch(visit, until)
            broken = visit.broken() + self._repair(visit)
            run.broken += broken
            code = visit.process.returncode
            self.note("; ".join([f"run {number}, start {run.starts}: exit code {code}", *broken]))
            if code == 0:
                run.different = differences(self.folder / "alone", self.folder / run.name)
                self.note("; ".join([f"run {number} ended, {len(run.different)} differences", *run.different]))
                return run
        raise RuntimeError(f"{run.name} does not end:\n{visit.log.read_text()[-2000:]}")

    def _start(self, run: Run) -> Visit:
        run.starts += 1
        again = ["--resume"] if (self.folder / run.name / "config.yaml").exists() else []
        where = ["--cluster", run.address] if run.address else []
        words = kills.duorl("compare", "--config", "soak.yaml", "--out", run.name, *where, *again)
        log = self.folder / f"{run.name.replace('/', '-')}-{run.starts}.log"
        excuses = {"is broken or not a checkpoint"} if run.damaged else set()
        self.visit = Visit(run, kills.launch(words, self.folder, log), log, excuses)
        return self.visit

    def _watch(self, visit: Visit, until: float) -> None:
        while visit.process.poll() is None:
            time.sleep(0.1)
            if visit.age > _LONGEST:
                visit.end(signal.SIGKILL)
                raise RuntimeError(f"{visit.run.name} hangs:\n{visit.log.read_text()[-2000:]}")
            if self.due <= time.monotonic() < until and visit.age > _STARTING:
                self._disturb(visit)
                self.due = self._next()

    def _disturb(self, visit: Visit) -> None:
        """Do the first thing on the deck that is possible now; each comes once before any comes again."""
        if not self.deck:
            self.deck = self.draw.sample(list(self.kinds), len(self.kinds))
        for kind in self.deck:
            if done := self.kinds[kind](visit, kind):
                self.deck.remove(kind)
                visit.run.met[done] += 1
                return self.note(f"{visit.run.name.replace('disk/', 'run ')}: {done}")
        self.deck = []

    def _signal(self, visit: Visit, kind: str) -> str:
        visit.end(_SIGNALS[kind])
        return kind

    def _kill_worker(self, visit: Visit, kind: str) -> str | None:
        found = workers(os.getpid())
        if not found:
            return None
        visit.excuses.add("its process died (SIGKILL")
        os.kill(self.draw.choice(found), signal.SIGKILL)
        return kind

    def _fill(self, visit: Visit, kind: str) -> str:
        visit.excuses.add("the disk is full")
        self.disk.fill()
        try:
            visit.process.wait(self.draw.uniform(*_FULL))
        except subprocess.TimeoutExpired:
            pass
        finally:
            self.disk.free()
        return kind

    def _lose(self, visit: Visit, kind: str) -> str | None:
        if not (self.machines and visit.run.address):
            return None
        self.machines.lose()
        return kind

    def _damage(self, visit: Visit, kind: str) -> str | None:
        """Stop a run and damage a whole checkpoint; if there is none any more, it was only stopped."""
        run, damaged = self.folder / visit.run.name, visit.run.damaged
        if not set(unfinished(run)) - damaged:
            return None
        stop = self.draw.choice(["SIGKILL to the main process", "SIGTERM to the main process"])
        visit.end(_SIGNALS[stop])
        if not (found := sorted(set(unfinished(run)) - damaged)):
            return stop
        path = self.draw.choice(found)
        _DAMAGES[kind](path, self.draw)
        damaged.add(path)
        return kind

    def _repair(self, visit: Visit) -> list[str]:
        """Delete the damaged checkpoints that a message names; returns broken promises about them."""
        run, broken = visit.run, []
        for name in sorted(set(_BROKEN.findall(visit.log.read_text()))):
            path = self.folder / name
            if path not in run.damaged:
                broken.append(f"{name} is called broken")
            run.damaged.discard(path)
            path.unlink(missing_ok=True)
        if visit.process.returncode == 0 and run.damaged:
            broken.append("a damaged checkpoint was used")
        return broken


def differences(alone: Path, run: Path) -> list[str]:
    """Differences between two finished runs: weights, curves and tables; and what should not be left in the second."""
    found = kills.differences(alone, run)
    one, other = (json.loads((folder / "comparison.json").read_text()) for folder in (alone, run))
    found += [f"table: {row['router']}" for row, same in zip(_rows(one), _rows(other), strict=True) if row != same]
    found += ["frontiers"] if one["frontiers"] != other["frontiers"] else []
    left = [*run.rglob(CHECKPOINT), *run.glob("errors/*")]
    return found + [f"left: {path.relative_to(run)}" for path in left]


def _rows(comparison: dict) -> list[dict]:
    return [{name: value for name, value in row.items() if name not in _TIMED} for row in comparison["rows"]]


def rows(kinds: list[str], runs: list[Run]) -> list[dict]:
    """A row per kind of disturbance, and one for all."""
    found = []
    for kind in [*kinds, "all"]:
        met = [run for run in runs if run.met[kind] or kind == "all"]
        found.append(
            {
                "disturbance": kind,
                "times": sum(run.met.total() if kind == "all" else run.met[kind] for run in met),
                "runs": len(met),
                "differ": sum(bool(run.different) for run in met),
                "broken": sum(bool(run.broken) for run in met),
            }
        )
    return found


def markdown(table: list[dict]) -> str:
    """The rows as a table."""
    head = ["disturbance", "times", "runs that met it", "of these, runs that differ", "runs with a broken promise"]
    return grid(head, ([str(value) for value in row.values()] for row in table), numbers=range(1, len(head)))


def soak(options: argparse.Namespace, folder: Path) -> bool:
    """Disturb runs until the minutes are over, write the JSON and print the table; returns whether all went well."""
    one = Soak(folder, options.scale, tuple(options.every), options.seed, options.cluster)
    try:
        seconds, runs = one.alone(), list[Run]()
        until = one.began + 60 * options.minutes
        while time.monotonic() < until:
            runs.append(one.disturbed(len(runs), until))
            if runs[-1].different:
                shutil.copytree(folder / runs[-1].name, folder / f"differs-{len(runs)}")
            shutil.rmtree(folder / runs[-1].name)
    finally:
        one.close()
    found = rows(list(one.kinds), runs)
    broken = [promise for run in runs for promise in run.broken]
    starts = sum(run.starts for run in runs)
    record(options.out, rows=found, alone=round(seconds), starts=starts, broken=broken, events=one.events)
    print(markdown(found))
    return not broken and not found[-1]["differ"]


def main() -> None:
    """Print the table; exit code 1 if a run differs or a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120, help="after which nothing is disturbed any more")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="size of the runs; 1 takes some minutes on two cores")
    parser.add_argument("--every", type=float, nargs=2, default=(60, 120), help="seconds between two disturbances")
    parser.add_argument(
        "--cluster", action="store_true", help="every second run is on a Ray cluster that loses machines"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/soak.json"))
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # releases the disk
    folder = Path(tempfile.mkdtemp())
    if not soak(options, folder):
        sys.exit(f"logs and runs that differ are in {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
