"""Kill runs at random moments, continue them, and compare them with runs that were not killed.

python benchmarks/kills.py --kills 50      # a Markdown table on standard output

Every run must end with the same weights, to the last bit, and the same TensorBoard curves as the run without kills.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

_EVALUATION = "{windows: 4, reference_windows: 1, fixed_windows: 1, finalists: 2, final_windows: 2}"
_SMALL = f"""
corpus: [text.txt]
env: {{windows_per_batch: 1, group_size: 2, window: 32}}
evaluation: {_EVALUATION}
validations: 3
save_every: 0
"""
_SPARSE = _SMALL.replace("save_every: 0", "save_every: 2")  # the updates after the last save are repeated
_RIVALS = """
rivals:
  supervised: {class_path: Supervised, init_args: {windows: 1, epochs: 3}}
  soft: {class_path: Soft, init_args: {updates: 12}}
"""
_PRETRAIN = """
corpus: [text.txt]
vocab_size: 300
window: 32
evaluation_windows: 4
backbone: {model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2}
training:
  {max_steps: 60, per_device_train_batch_size: 2, save_steps: 7, logging_steps: 5, eval_strategy: steps, eval_steps: 20,
   report_to: tensorboard, disable_tqdm: true}
"""
RUNS = {
    "train PPO": ("train", _SPARSE + _RIVALS + "total_decisions: 24000"),
    "train DQN": ("train", _SMALL + "rivals: []\nagent: DQN\ntotal_decisions: 8000"),
    "train REINFORCE": ("train", _SPARSE + "rivals: []\nagent: REINFORCE\ntotal_decisions: 32000"),
    "train ReinMax": ("train", _SMALL + "rivals: []\nagent: ReinMax\ntotal_decisions: 8000"),
    "train GFlowNet": ("train", _SMALL + "rivals: []\nagent: GFlowNet\ntotal_decisions: 8000"),
    "train to a target": ("train", _SMALL + _RIVALS + "target_compute: 0.5\ntotal_decisions: 4000"),
    "train for all prices": ("train", _SMALL + _RIVALS + "env.prices: [0.02, 0.8]\ntotal_decisions: 4000"),
    "compare": (
        "compare",
        _SMALL + _RIVALS + "agents: {PPO: PPO, MEX: MEX}\nprocesses: 2\nseeds: 2\ntotal_decisions: 4000",
    ),
    "pretrain": ("pretrain", _PRETRAIN),
}
_TIMES = ("time", "runtime", "per_second", "total_flos")  # depend on the time of a run, not on its results


def prepare(folder: Path, runs: dict[str, tuple[str, str]] | None = None) -> None:
    """Write the text and the configurations of runs; by default, of all."""
    modules = sorted(Path(os.__file__).parent.glob("*.py"))[:20]
    (folder / "text.txt").write_text("\n".join(module.read_text("utf8") for module in modules))
    for name, (_, config) in (RUNS if runs is None else runs).items():
        (folder / f"{name}.yaml").write_text(config)


def command(name: str, out: str, *more: str) -> list[str]:
    """The command of a run, in a new process."""
    return duorl(RUNS[name][0], "--config", f"{name}.yaml", "--out", out, *more)


def duorl(*words: str) -> list[str]:
    """A command of DuoRL, in a new process."""
    return [sys.executable, "-c", "from duorl.cli import main; main()", *words]


def start(name: str, out: str, folder: Path, *more: str) -> subprocess.Popen:
    """Start a run with one thread."""
    return launch(command(name, out, *more), folder, folder / f"{out}.log")


def launch(words: list[str], folder: Path, to: Path) -> subprocess.Popen:
    """Start a command in a folder, with one thread; what it says is added to a file."""
    one = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(to, "a") as log:
        return subprocess.Popen(words, cwd=folder, env=one, stdout=log, stderr=log)


def finish(name: str, out: str, folder: Path, *more: str) -> float:
    """Run to the end; returns the seconds."""
    began = time.monotonic()
    if (code := start(name, out, folder, *more).wait()) != 0:
        raise RuntimeError(f"{name} ended with {code}:\n{(folder / f'{out}.log').read_text()[-2000:]}")
    return time.monotonic() - began


def kill(name: str, out: str, folder: Path, after: float, signum: int) -> int | None:
    """Start or continue a run, and send it a signal after some seconds; returns the exit code, or None if it ended
    earlier.
    """
    begun = (folder / out).is_dir()
    process = start(name, out, folder, *(["--resume"] if begun else []))
    try:
        process.wait(after)
        return None
    except subprocess.TimeoutExpired:
        process.send_signal(signum)
    return process.wait(120)


def kill_in_training(name: str, out: str, folder: Path, signum: int, after: float) -> int:
    """Start a run, and send it a signal some seconds after its first checkpoint; returns the exit code."""
    process = start(name, out, folder)
    while process.poll() is None and not any((folder / out).rglob("*checkpoint*")):
        time.sleep(0.05)
    try:
        process.wait(after)
    except subprocess.TimeoutExpired:
        process.send_signal(signum)
    return process.wait(120)


def differences(one: Path, other: Path) -> list[str]:
    """Differences between two finished runs: weights by file, curves by tag."""
    found = []
    weights = [path.relative_to(one) for path in sorted(one.rglob("*.safetensors")) if "checkpoints" not in path.parts]
    for path in weights:
        if not (other / path).is_file() or (one / path).read_bytes() != (other / path).read_bytes():
            found.append(str(path))
    for folder in sorted({path.parent.relative_to(one) for path in one.rglob("events.out.tfevents.*")}):
        expected, actual = curves(one / folder), curves(other / folder)
        found += [f"{folder} {tag}" for tag in expected | actual if expected.get(tag) != actual.get(tag)]
    return found if weights else ["no weights"]


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values by tag, as TensorBoard reads them."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not any(word in tag for word in _TIMES)]
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in tags}


def interrupted(name: str, folder: Path, seconds: float, draw: random.Random, kills: int, out: str) -> dict[str, int]:
    """Kill a run several times, resume it to its end, and count the kinds of kills."""
    counts = {"kills": 0, "early": 0}
    for _ in range(kills):
        signum = draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        code = kill(name, out, folder, draw.uniform(0.0, 0.8 * seconds), signum)
        if code is None:
            break
        expected = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[signum]
        counts["early"] += code != expected and code in (-15, -2, 1)  # Python itself was still starting
        if code != expected and code not in (-15, -2, 1, 0):
            raise RuntimeError(f"{name} ended with {code} after signal {signum}")
        if "failed" in (folder / f"{out}.log").read_text():
            raise RuntimeError(f"a job of {name} failed:\n{(folder / f'{out}.log').read_text()[-2000:]}")
        counts["kills"] += 1
    finish(name, out, folder, *(["--resume"] if (folder / out).is_dir() else []))
    return counts


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="number of kills, of all runs together")
    parser.add_argument("--each", type=int, default=3, help="maximum of kills of one run")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw, folder = random.Random(options.seed), Path(tempfile.mkdtemp())
    prepare(folder)
    seconds = {name: finish(name, f"{name} whole", folder) for name in RUNS}
    rows = {name: {"runs": 0, "kills": 0, "differences": 0} for name in RUNS}
    number = 0
    while sum(row["kills"] for row in rows.values()) < options.kills:
        name = list(RUNS)[number % len(RUNS)]
        left = options.kills - sum(row["kills"] for row in rows.values())
        out = f"{name} {number}"
        counts = interrupted(name, folder, seconds[name], draw, min(options.each, left), out)
        different = differences(folder / f"{name} whole", folder / out)
        print(name, counts, different, file=sys.stderr)
        rows[name]["runs"] += 1
        rows[name]["kills"] += counts["kills"]
        rows[name]["differences"] += bool(different)
        number += 1
    print("| run | alone, s | runs | kills | runs that differ from the one left alone |\n|---|---:|---:|---:|---:|")
    for name, row in rows.items():
        print(f"| {name} | {seconds[name]:.0f} | {row['runs']} | {row['kills']} | {row['differences']} |")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
