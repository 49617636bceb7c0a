"""The performance of DuoRL as one table that is kept.

    make bench
    make bench QUICK=1

It writes benchmarks/results/latest.json, and without QUICK the tables of docs/explanation/performance.md. Every row is
a ratio or a size that was measured in this run: its median, its quartiles if there are repetitions, and its goal if it
has one. A curve has the time of one thing at several sizes, and the exponent of the power law that fits best. All times
are those of one thread, so that machines of other sizes can be compared.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import duorl
from benchmarks import decode, oracle, rollout, updates
from benchmarks.processes import side_by_side
from benchmarks.record import record
from duorl import agents, ranks
from duorl.envs import Lockstep
from duorl.markdown import grid
from duorl.models.footprint import Batch, Keeps, peak_bytes
from duorl.runs.allocator import keep_freed_memory

ROOT = Path(__file__).resolve().parent.parent
PAGE, MARKS = ROOT / "docs" / "explanation" / "performance.md", ("<!-- bench -->\n", "<!-- end of bench -->\n")
PACKAGES = ("torch", "transformers", "gymnasium", "stable-baselines3", "numpy")
GOALS = {
    "random rollout": "<= 1.15",
    "REINFORCE": "<= 1.3",
    "PPO": "<= 1.5",
    "ReinMax": "<= 4",
    "all-big": ">= 0.97",
    "of FLOPs saved": ">= 0.85",
    "search": ">= 0.9",
}
KEEPS: dict[str, Keeps] = {"REINFORCE": "states", "ReinMax": "everything"}
MEGABYTE = 2**20


@dataclass(frozen=True)
class Row:
    """What was measured: a median, its quartiles, and the goal."""

    name: str
    value: float
    unit: str
    spread: tuple[float, float] | None = None
    goal: str | None = None

    @classmethod
    def of(cls, name: str, values: Sequence[float], unit: str, goal: str | None = None) -> Row:
        """The row of repeated measurements."""
        low, middle, high = statistics.quantiles(values, n=4)
        return cls(name, middle, unit, (low, high), goal)


@dataclass(frozen=True)
class Curve:
    """Seconds at several sizes, and the exponent of the power law that fits best."""

    name: str
    sizes: list[int]
    seconds: list[float]

    @property
    def exponent(self) -> float:
        """Slope of log seconds over log size."""
        return float(np.polyfit(np.log(self.sizes), np.log(self.seconds), 1)[0])


def windows(model: duorl.DuoForCausalLM, tokens: int, length: int = 128) -> Tensor:
    """Random windows with this many tokens to predict."""
    shape = (tokens // length, length + 1)
    return torch.randint(model.config.backbone.vocab_size, shape, generator=torch.Generator().manual_seed(0))


def passes(model: duorl.DuoForCausalLM, repeats: int) -> Iterator[Row]:
    """Routed passes in plain ones, and an update of every learner."""
    runs = rollout.passes(model, windows(model, 2048))
    chosen = {name: runs[name] for name in ("plain", "random rollout")}
    with torch.no_grad():
        times = rollout.measured({name: run for name, (run, _) in chosen.items()}, repeats)
    pairs = zip(times["random rollout"], times["plain"], strict=True)
    yield Row.of("random rollout", [own / plain for own, plain in pairs], "plain passes", GOALS["random rollout"])
    for name, found in updates.ratios(model, windows(model, 2048), repeats):
        if name != "random rollout":
            yield Row.of(f"update of {name}", found, "plain passes", GOALS.get(name))


def search(model: duorl.DuoForCausalLM, repeats: int) -> Iterator[Row]:
    """The exhaustive search against one pass per route."""
    found = oracle.measure(model, ("small", "big"), "reference", 1, rounds=repeats)
    unit = "time saved, of FLOPs saved"
    yield Row("search of all routes", found.time_ratio / found.flop_ratio, unit, goal=GOALS["search"])


@torch.no_grad()
def decoding(model: duorl.DuoForCausalLM, repeats: int, long: int) -> Iterator[Row]:
    """Generation and a long prompt with a router against the original model."""
    for row in decode.rows(model, repeats, (1, 8), long):
        name = f"{row['case']}, {row['router']}"
        if row["router"] == "all-big":
            middle, low, high = row["speed"]
            yield Row(name, middle, "of the original's tokens/s", (low, high), GOALS["all-big"])
        elif row["of_flops_saved"] is not None:
            yield Row(name, row["of_flops_saved"], "time saved, of FLOPs saved", goal=GOALS["of FLOPs saved"])


def start_up(repeats: int) -> Iterator[Row]:
    """Seconds until a command answers, in a process of its own."""
    for name, words in {
        "duorl --help": ["-m", "duorl", "--help"],
        "duorl train --print_config": ["-m", "duorl", "train", "--print_config"],
        "import duorl": ["-c", "import duorl"],
    }.items():
        start = partial(subprocess.run, [sys.executable, *words], check=True, capture_output=True)
        yield Row.of(name, [oracle.seconds(start) for _ in range(repeats)], "s")


def resident() -> int:
    """Bytes of memory that this process has at most had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def growth_of_memory(name: str) -> tuple[int, float, float]:
    """Tokens of an update of a learner, bytes by which a process grows in it, and what `peak_bytes` says."""
    torch.set_num_threads(1)
    model = duorl.load("duo-tiny")
    env = Lockstep(model, windows(model, 4096), windows_per_batch=32, group_size=1 if name == "ReinMax" else 2)
    before = resident()
    getattr(agents, name)(env).learn(env.layers * env.num_tokens)
    length = env.windows.shape[1] - 1
    said = peak_bytes(model.config, Batch(env.num_tokens // length, length, KEEPS[name]), model.dtype)
    return env.num_tokens, resident() - before, said


def memory() -> Iterator[Row]:
    """The growth of a process's memory in an update, in new processes."""
    for name in KEEPS:
        with side_by_side(1) as pool:
            tokens, grown, said = pool.submit(growth_of_memory, name).result()
        unit = f"MB beside the model; the check before a training says {said / MEGABYTE:,.0f}"
        yield Row(f"memory of {name}, {tokens:,} tokens", grown / MEGABYTE, unit)


def update_seconds(model: duorl.DuoForCausalLM, tokens: int, repeats: int) -> float:
    """Median seconds of an update of REINFORCE."""
    env = Lockstep(model, windows(model, tokens), windows_per_batch=tokens // 256, group_size=2)
    agent = agents.REINFORCE(env)
    agent.planned = 10**9
    return statistics.median(rollout.measured({"": agent.update}, repeats)[""])  # type: ignore[dict-item]


def training(seed: int) -> None:
    """A short training, for several at the same time."""
    model = duorl.load("duo-tiny")
    agents.REINFORCE(Lockstep(model, windows(model, 2048), windows_per_batch=8, group_size=2, seed=seed)).learn(200_000)


def side_by_side_seconds(count: int) -> float:
    """Seconds of as many trainings as seeds, at the same time, without the start of the processes."""
    with side_by_side(count) as pool:
        list(pool.map(training, range(count)))  # the start, and what is loaded once
        return oracle.seconds(lambda: list(pool.map(training, range(count))))


def curves(quick: bool) -> Iterator[Curve]:
    """How times grow."""
    repeats, tiny = 3 if quick else 7, duorl.load("duo-tiny")

    def curve(name: str, sizes: list[int], run: Callable[[int], float]) -> Curve:
        return Curve(name, sizes, [run(size) for size in sizes])

    layers = [4, 8, 16] if quick else [4, 8, 16, 32]
    yield curve("update by layers", layers, lambda size: update_seconds(oracle.random_duo(size), 1024, repeats))
    yield curve("update by tokens", [512, 1024, 2048, 4096], lambda size: update_seconds(tiny, size, repeats))
    words = [2048, 8192, 32768]
    large = [oracle.random_duo(8, vocab_size=size) for size in words]
    yield curve("update by vocabulary", words, lambda size: update_seconds(large[words.index(size)], 512, repeats))
    actions = ("small", "big"), ("skip", "small", "big")
    yield curve("search by actions", [2, 3], lambda size: oracle.measure(tiny, actions[size - 2], "reference", 1, 2)[0])
    yield curve("trainings by seeds", [1, os.cpu_count() or 1], side_by_side_seconds)
    yield curve("training of equal text by ranks", [1, os.cpu_count() or 1], ranks_seconds)


def ranks_seconds(count: int) -> float:
    """Seconds of a training by this many ranks, each with its part of every batch, without their start."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    words = [*launcher, "-m", "benchmarks.bench", "--rank", str(16 // count)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    return max(float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("seconds "))


def rank(own: int) -> None:
    """A training of one rank; `own`: windows of its batches. Prints its seconds."""
    ranks.connect()
    model = duorl.load("duo-tiny")
    agent = agents.REINFORCE(Lockstep(model, windows(model, 8192), windows_per_batch=own // 2, group_size=2))
    agent.learn(agent.decisions_per_update)
    print("seconds", oracle.seconds(lambda: agent.learn(10 * agent.decisions_per_update)), flush=True)


def machine() -> dict[str, object]:
    """What the numbers depend on."""
    known = Path("/proc/cpuinfo")
    names = [line for line in known.read_text().splitlines() if "model name" in line] if known.is_file() else []
    processor = names[0].split(":")[1].strip() if names else platform.processor()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    versions |= {"python": platform.python_version()}
    return {"processor": processor, "cores": os.cpu_count(), "versions": versions, "commit": commit.strip()}


def markdown(rows: list[dict], curves: list[dict]) -> str:
    """Both tables."""
    lines = []
    for row in rows:
        spread = "" if row["spread"] is None else "{:,.2f} to {:,.2f}".format(*row["spread"])
        lines.append([row["name"], f"{row['value']:,.2f}", spread, row["goal"] or "", row["unit"]])
    table = grid(("what", "median", "quartiles", "goal", "unit"), lines, numbers=(1,))
    lines = []
    for curve in curves:
        sizes, seconds = (", ".join(map(shown, curve[key])) for key, shown in (("sizes", str), ("seconds", _short)))
        lines.append([curve["name"], sizes, seconds, f"{curve['exponent']:.2f}"])
    return table + "\n" + grid(("growth", "sizes", "seconds", "exponent"), lines, numbers=(3,))


def _short(seconds: float) -> str:
    return f"{seconds:.3g}"


def rewrite(page: Path, table: str) -> None:
    """Put the tables into the page, between its marks."""
    text = page.read_text()
    head, tail = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
    page.write_text(head + MARKS[0] + "\n" + table + "\n" + MARKS[1] + tail)


def main() -> None:
    """Measure, write the JSON and the page, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repetitions, and the page stays")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "latest.json")
    options = parser.parse_args()
    if options.rank:
        return rank(options.rank)
    keep_freed_memory()
    torch.set_num_threads(1)
    repeats, model = 3 if options.quick else 11, duorl.load("duo-tiny")
    parts = (
        passes(model, repeats),
        search(model, 2 if options.quick else 5),
        decoding(model, repeats, 512 if options.quick else 2048),
        start_up(repeats),
        memory(),
    )
    rows = []
    for part in parts:
        for row in part:
            print(f"{row.name}: {row.value:.3g} {row.unit}", flush=True)
            rows.append(asdict(row))
    grown = [{**asdict(curve), "exponent": curve.exponent} for curve in curves(options.quick)]
    record(options.out, rows=rows, curves=grown, **machine())
    table = markdown(rows, grown)
    if not options.quick:
        rewrite(PAGE, table)
    print(table)


if __name__ == "__main__":
    main()
