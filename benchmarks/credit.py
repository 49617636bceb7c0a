"""Compares methods of reducing variance and of assigning credit: the table of docs/learning.md.

    python -m benchmarks.credit --out docs/results/credit.json

Every variant learns from equally many layer decisions on duo-tiny at one price, with several seeds. Its return is
measured in the routed context, on files of the router split that no training used, and compared with that of REINFORCE
with leave-one-out and the same seed. The evaluation split is not used. The spread of the gradient is measured before
and after the training. It is the trace of the covariance of single updates' gradients, divided by the squared norm of
their mean.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

import duorl
from duorl import agents
from duorl.agents.stable_baselines import StableBaselinesAgent
from duorl.corpus import Windows, cut, documents
from duorl.envs import Lockstep
from duorl.evaluation.compare import measure
from duorl.evaluation.statistics import estimate
from duorl.learners import Soft
from duorl.rewards import LogitLensShaping, LossImprovement, Reward, TeacherKL
from duorl.routers import ConstantRouter, PatternRouter
from duorl.runs.allocator import keep_freed_memory

PRICE = 0.3
HELD_OUT = 256  # windows
PATTERN = [1, 1, 1, 1, 1, 2, 1, 2]  # the best pattern with two big layers, on router text
YARDSTICK = "REINFORCE, leave-one-out of 2"


class BareLoss(Reward):
    """The default reward with minus the loss in place of the gain."""

    def __call__(self, step):
        """(N,) nats."""
        return (0.0 if step.loss is None else -step.loss) - PRICE * step.compute


def variants() -> dict[str, tuple[Callable[..., agents.Agent], dict]]:
    """By name: a learner, and the options of its environment that are not the default."""
    reinforce = agents.REINFORCE
    default = LossImprovement(PRICE)
    return {
        YARDSTICK: (reinforce, {}),
        "REINFORCE, leave-one-out of 4, half the windows": (reinforce, {"group_size": 4, "windows_per_batch": 4}),
        "REINFORCE, no baseline": (partial(reinforce, baseline="none"), {}),
        "REINFORCE, mean of the layer": (partial(reinforce, baseline="mean"), {}),
        "REINFORCE, learned value": (partial(reinforce, baseline="value"), {}),
        "REINFORCE, bare loss, mean of the layer": (partial(reinforce, baseline="mean"), {"reward": BareLoss()}),
        "REINFORCE, bare loss, leave-one-out of 2": (reinforce, {"reward": BareLoss()}),
        "REINFORCE, later tokens' gains, 0.5 per token": (reinforce, {"token_discount": 0.5}),
        "REINFORCE, later tokens' gains, 0.95 per token": (reinforce, {"token_discount": 0.95}),
        "REINFORCE, distance to all-big": (reinforce, {"reward": TeacherKL(PRICE)}),
        "REINFORCE, half distance, half label": (reinforce, {"reward": TeacherKL(PRICE, share=0.5)}),
        "REINFORCE, intermediate predictions": (reinforce, {"reward": default + LogitLensShaping(0.3)}),
        "REINFORCE, from the fixed pattern": (partial(reinforce, init="pattern"), {}),
        "REINFORCE, from the soft router": (partial(reinforce, init="soft", learning_rate=1e-3), {}),
        "PPO, learned value": (agents.PPO, {"group_size": 1, "windows_per_batch": 16}),
        "PPO, leave-one-out of 2": (agents.PPO, {}),
        "ReinMax": (agents.ReinMax, {"group_size": 1, "windows_per_batch": 16}),
        "ReinMax, half corrected": (partial(agents.ReinMax, correction=0.5), {}),
        "ReinMax, fully corrected": (partial(agents.ReinMax, correction=1.0), {}),
    }


@lru_cache(maxsize=1)
def text() -> tuple[duorl.DuoForCausalLM, Tensor, Windows]:
    """The model, and windows of the router split: of files for training, and of held-out files."""
    model, tokenizer = duorl.load("duo-tiny"), duorl.load_tokenizer("duo-tiny")
    files = documents(["stdlib-code", "stdlib-docs"], "router")
    held_out = set(sorted({file.path for file in files})[::3])
    learned = cut([file for file in files if file.path not in held_out], tokenizer, 128)
    others = cut([file for file in files if file.path in held_out], tokenizer, 128)
    assert learned is not None and others is not None
    return model, learned.tokens, others.first(HELD_OUT)


def learner(name: str, seed: int, starts: Path) -> agents.Agent:
    """A new learner of a variant."""
    factory, options = variants()[name]
    if isinstance(factory, partial) and "init" in factory.keywords:
        factory = partial(factory, init=str(starts / factory.keywords["init"]))
    model, training, _ = text()
    usual = {"windows_per_batch": 8, "group_size": 2, "reward": LossImprovement(PRICE), "seed": seed}
    return factory(Lockstep(model, training, **{**usual, **options}))


def gradient_spread(agent: agents.Agent, updates: int) -> float | None:
    """Trace of the covariance of an update's gradient over the squared norm of its mean; the policy does not change.

    Infinite if the mean of these updates cannot be told from noise; None for learners of Stable-Baselines3.
    """
    if isinstance(agent, StableBaselinesAgent):
        return None
    agent.learning_rate = 0.0
    agent.router.requires_grad_(True)
    gradients = []
    for _ in range(updates):
        agent.update()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in agent.router.parameters()]))
    found = torch.stack(gradients)
    variance = found.var(0).sum()
    signal = found.mean(0).square().sum() - variance / updates  # minus the noise of the mean
    return (variance / signal).item() if signal > 0 else math.inf


@torch.no_grad()
def returns(router) -> Tensor:
    """Held-out returns per window at the price, (W,)."""
    model, _, (windows, _) = text()
    reference = measure(model, ConstantRouter("small"), windows).loss
    measured = measure(model, router, windows)
    return (reference - measured.loss - PRICE * measured.compute).mean(1)


def study(job: tuple[str, int], decisions: int, updates: int, starts: Path) -> dict:
    """Train once; returns the returns, and the spread of the gradient before and after."""
    name, seed = job
    fresh = gradient_spread(learner(name, seed, starts), updates) if seed == 0 else None
    agent = learner(name, seed, starts)
    router = agent.learn(decisions)
    found = {"name": name, "seed": seed, "returns": returns(router).tolist(), "fresh": fresh}
    return found | {"trained": gradient_spread(agent, updates) if seed == 0 else None}


def prepare(starts: Path, soft_updates: int) -> None:
    """Train the routers from which some variants start."""
    model, training, _ = text()
    PatternRouter(PATTERN).save_pretrained(starts / "pattern")
    env = Lockstep(model, training, reward=LossImprovement(PRICE), windows_per_batch=8)
    Soft(env, updates=soft_updates).learn(1).save_pretrained(starts / "soft")


def rows(found: list[dict]) -> list[dict]:
    """A row per variant: mean return, paired difference to REINFORCE with the same seed, spread of the gradient."""
    by_name = {name: [one for one in found if one["name"] == name] for name in variants()}
    files = text()[2].files
    stacked = {name: torch.tensor([one["returns"] for one in seeds]) for name, seeds in by_name.items()}
    return [
        {
            "name": name,
            "seeds": len(values),
            "return": values.mean().item(),
            "minus": (values - stacked[YARDSTICK]).mean().item(),
            "interval": estimate(values - stacked[YARDSTICK], files).interval,
            "fresh": by_name[name][0]["fresh"],
            "trained": by_name[name][0]["trained"],
        }
        for name, values in stacked.items()
    ]


def markdown(table: list[dict]) -> str:
    """The rows as a table."""
    lines = ["| learner | return | minus the first's | spread, fresh | spread, trained |", "|---|---:|---:|---:|---:|"]
    for row in table:
        low, high = row["interval"]
        minus = f"{row['minus']:+.4f} ({low:+.4f}, {high:+.4f})" if row["name"] != YARDSTICK else ""
        spreads = [_spread(row[key]) for key in ("fresh", "trained")]
        lines.append(f"| {row['name']} | {row['return']:+.4f} | {minus} | {spreads[0]} | {spreads[1]} |")
    return "\n".join(lines) + "\n"


def _spread(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if math.isfinite(value) else "noise alone"


def main() -> None:
    """Run all trainings, write the JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decisions", type=int, default=200_000, help="layer decisions of every training")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--updates", type=int, default=10, help="number of gradients for a spread")
    parser.add_argument("--processes", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("runs/credit.json"))
    options = parser.parse_args()
    keep_freed_memory()
    jobs = [(name, seed) for seed in range(options.seeds) for name in variants()]
    with tempfile.TemporaryDirectory() as folder:
        starts = Path(folder)
        prepare(starts, soft_updates=max(1, options.decisions // 8192))
        run = partial(study, decisions=options.decisions, updates=options.updates, starts=starts)
        threads = max(1, torch.get_num_threads() // options.processes)
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(options.processes, spawn, torch.set_num_threads, (threads,)) as pool:
            found = list(pool.map(run, jobs))
    table = rows(found)
    command = f"python -m benchmarks.credit --decisions {options.decisions} --seeds {options.seeds}"
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"command": command, "rows": table}, indent=1))
    print(markdown(table))


if __name__ == "__main__":
    main()
