"""Compares labels by deviations with labels from all routes: `python -m benchmarks.labels`.

The supervised router learns from some windows of duo-tiny's router text, at price 0.3. Its return is measured on other
text, in the routed context. Agreement is the share of labelled decisions whose best action is also the best by the
values of all routes: by the mean of the completions (temperature 1), or by the best completion (temperature 0).
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

import duorl
from duorl.envs import Lockstep
from duorl.evaluation import measure
from duorl.learners import Supervised
from duorl.learners.labels import action_values, routes_of
from duorl.learners.sources import Source
from duorl.oracle import RouteTable, exhaustive, fixed_patterns
from duorl.rewards import LossImprovement
from duorl.routed_pass import remember
from duorl.routers import ConstantRouter, PatternRouter, Router

_LABELLED, _MEASURED, _LENGTH, _PRICE, _SEEDS = 32, 48, 128, 0.3, 2


def agreement(env: Lockstep, base: str, text: Tensor, table: RouteTable) -> list[float]:
    """Share of decisions whose best deviation is the best action by all routes, at temperatures 1 and 0."""
    source = Source(env.model, env.actions, base)
    found = source.deviations(text, [_PRICE], torch.Generator().manual_seed(0))
    best = found.values(_PRICE).argmax(-1)  # (L, N)
    if source.policy is None:
        codes = torch.tensor([1, 2])
        drawn = torch.randint(2, (*text[:, 1:].shape, env.layers), generator=torch.Generator().manual_seed(0))
        routes = codes[drawn]
    else:
        routes = routes_of(source.policy, env.model, text, remember(env.model, text))
    index = table.index_of(routes)
    values = (action_values(table, _PRICE, index, temperature) for temperature in (1.0, 0.0))
    return [(best == exact.argmax(-1).flatten(0, 1).T).float().mean().item() for exact in values]


def returns(model: duorl.DuoForCausalLM, router: Router, windows: Tensor, reference: Tensor) -> Tensor:
    """Mean return of each window, (W,)."""
    measured = measure(model, router, windows)
    return (reference - measured.loss - _PRICE * measured.compute).mean(1)


@torch.no_grad()
def main() -> None:
    """Measure and print a table in Markdown."""
    model, tokenizer = duorl.load("duo-tiny"), duorl.load_tokenizer("duo-tiny")
    text, held_out = (
        duorl.load_windows(["stdlib-code"], tokenizer, split=split, length=_LENGTH)[:count]
        for split, count in (("router", _LABELLED), ("evaluation", _MEASURED))
    )
    table = exhaustive(model, text)
    reference = measure(model, ConstantRouter("small"), held_out).loss
    patterns = fixed_patterns(model, text[:16])
    fixed = PatternRouter(min(patterns, key=lambda p: p.loss + _PRICE * p.compute).route)
    folder = Path(tempfile.mkdtemp())
    fixed.save_pretrained(folder / "fixed")
    bases = {
        "all routes, temperature 1": None,
        "deviations from random routes": "random",
        "from all-small": "small",
        "from all-big": "big",
        "from the best fixed pattern": str(folder / "fixed"),
        "from the router that learned from random routes": str(folder / "random"),
    }
    print(
        "| labels | agrees with the mean | with the best | seconds | compute | return |\n|---|---:|---:|---:|---:|---:|"
    )
    print(f"| (best fixed pattern) | | | | | {returns(model, fixed, held_out, reference).mean():+.4f} |")
    for name, base in bases.items():
        rows, spent, seconds = [], [], 0.0
        for seed in range(_SEEDS):
            env = Lockstep(model, text, reward=LossImprovement(_PRICE), windows_per_batch=2, seed=seed)
            learner = Supervised(env, windows=_LABELLED, base=base)
            started = time.process_time()
            learner.labels.decisions()
            seconds = time.process_time() - started
            with torch.enable_grad():
                router = learner.learn(1)
            if base == "random" and seed == 0:
                router.save_pretrained(folder / "random")
            rows.append(returns(model, router, held_out, reference))
            spent.append(measure(model, router, held_out).compute.mean().item())
        agrees = ["", ""] if base is None else [f"{share:.2f}" for share in agreement(env, base, text, table)]
        value = torch.stack(rows).mean().item()
        cells = [*agrees, f"{seconds:.1f}", f"{sum(spent) / len(spent):.2f}", f"{value:+.4f}"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
