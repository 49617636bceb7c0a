"""The time of one update of each learner, in plain forward passes: `python -m benchmarks.updates`.

A plain pass is the one of benchmarks/rollout.py: the forward pass of transformers, with head and losses, of a model
with alternating big and small layers, over equally many tokens. Every update uses 2,048 tokens of duo-tiny. The windows
were used before, as in a training after its first pass over the text. Each update runs between two plain passes, and
its time is divided by their mean. The benchmark prints medians and quartiles.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import duorl
from benchmarks.rollout import passes
from duorl import agents, envs, learners
from duorl.rewards import LossImprovement

WINDOWS, LENGTH = 16, 128


def seconds(run: Callable[[], object]) -> float:
    """Wall time in seconds."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--learners", nargs="*")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, tokenizer = duorl.load("duo-tiny"), duorl.load_tokenizer("duo-tiny")
    windows = duorl.load_windows(["stdlib-docs"], tokenizer, split="router", length=LENGTH)[:WINDOWS]
    plain = torch.no_grad()(passes(model, windows)["plain"])

    def env(group_size: int) -> envs.Lockstep:
        batch = WINDOWS // group_size
        return envs.Lockstep(
            model, windows, windows_per_batch=batch, group_size=group_size, reward=LossImprovement(0.3)
        )

    def rollout(lockstep: envs.Lockstep, generator: torch.Generator) -> None:
        lockstep.draw()
        while not lockstep.done:
            lockstep.step(torch.randint(2, (lockstep.num_tokens,), generator=generator))

    made = {name: getattr(agents, name)(env(2)) for name in ("PPO", "A2C", "REINFORCE", "GFlowNet", "DQN")}
    made |= {"ReinMax": agents.ReinMax(env(1)), "Soft": learners.Soft(env(1), updates=None)}
    random, generator = env(2), torch.Generator().manual_seed(0)
    runs: dict[str, Callable[[], object]] = {"random rollout": lambda: rollout(random, generator)}
    for name, learner in made.items():
        learner.planned = 10**9
        runs[name] = learner.update
    for name in options.learners or runs:
        runs[name](), runs[name](), plain()
        ratios = []
        for _ in range(options.repeats):
            before = seconds(plain)
            ratios.append(seconds(runs[name]) / ((before + seconds(plain)) / 2))
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"{name}: {middle:.2f} plain passes ({low:.2f} to {high:.2f})", flush=True)


if __name__ == "__main__":
    main()
