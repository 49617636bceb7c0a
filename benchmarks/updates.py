"""The time of one update of each learner, in plain forward passes: `python -m benchmarks.updates`.

A plain pass is the one of benchmarks/rollout.py: the forward pass of transformers, with head and losses, of a model
with alternating big and small layers, over equally many tokens. The windows were used before, as in a training after
its first pass over the text; with `--new`, they were not, and the plain pass of the reference route is part of the
unit. Each update runs between two plain passes, and its time is divided by their mean. The benchmark prints medians and
quartiles.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

import duorl
from benchmarks.rollout import plain_pass, seconds
from duorl import agents, envs, learners
from duorl.costs import SMALL
from duorl.learners.base import Learner
from duorl.rewards import LossImprovement
from duorl.runs.allocator import keep_freed_memory

AGENTS = ("PPO", "A2C", "REINFORCE", "GFlowNet", "DQN")


def options() -> argparse.Namespace:
    """What to measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="duo-tiny")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--learners", nargs="*")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--new", action="store_true", help="the windows were not used before")
    return parser.parse_args()


def updates(model: duorl.DuoForCausalLM, windows: Tensor) -> dict[str, tuple[envs.Lockstep, Callable[[], object]]]:
    """An environment and one update in it, by name of the learner."""

    def env(copies: int) -> envs.Lockstep:
        batch = {"windows_per_batch": len(windows) // copies, "group_size": copies}
        return envs.Lockstep(model, windows, **batch, reward=LossImprovement(0.3))

    random, generator = env(2), torch.Generator(model.device).manual_seed(0)

    def rollout() -> None:
        random.draw()
        while not random.done:
            random.step(torch.randint(2, (random.num_tokens,), generator=generator, device=model.device))

    made: dict[str, Learner] = {name: getattr(agents, name)(env(2)) for name in AGENTS}
    made |= {"ReinMax": agents.ReinMax(env(1)), "Soft": learners.Soft(env(1), updates=None)}
    for learner in made.values():
        learner.planned = 10**9
    return {"random rollout": (random, rollout)} | {name: (one.env, one.update) for name, one in made.items()}


def ratios(
    model: duorl.DuoForCausalLM,
    windows: Tensor,
    repeats: int,
    chosen: Sequence[str] | None = None,
    new: bool = False,
) -> Iterator[tuple[str, list[float]]]:
    """By name of the learner: the times of its update, in plain passes."""
    plain = torch.no_grad()(plain_pass(model, windows))
    for name, (env, update) in updates(model, windows).items():
        if chosen and name not in chosen:
            continue
        units = [plain]
        if new:
            reference = plain_pass(model, windows[: env.windows_per_batch], [SMALL] * model.num_layers)
            units.append(torch.no_grad()(reference))
        update(), update(), [unit() for unit in units]
        found = []
        for _ in range(repeats):
            before = sum(map(seconds, units))
            if new:
                env._known_losses.fill_(torch.nan)
            found.append(seconds(update) / ((before + sum(map(seconds, units))) / 2))
        yield name, found


def main() -> None:
    """Measure and print."""
    asked = options()
    keep_freed_memory()
    torch.set_num_threads(asked.threads)
    model, tokenizer = (
        duorl.load(asked.model, dtype=asked.dtype, device=asked.device),
        duorl.load_tokenizer(asked.model),
    )
    windows = duorl.load_windows(["stdlib-docs"], tokenizer, split="router", length=asked.length)
    windows = windows[: asked.windows].to(model.device)
    print(
        f"{asked.model} in {asked.dtype} on {asked.device}, {windows[:, 1:].numel()} tokens, {asked.threads} threads",
        flush=True,
    )
    for name, found in ratios(model, windows, asked.repeats, asked.learners, asked.new):
        low, middle, high = statistics.quantiles(found, n=4)
        print(f"{name}: {middle:.2f} plain passes ({low:.2f} to {high:.2f})", flush=True)


if __name__ == "__main__":
    main()
