"""How far approximate oracles and the pattern program are from the exhaustive ones: `python benchmarks/approximate.py`.

On held-out text of duo-tiny in the reference context, whose exhaustive optimum is known. Distances are in nats of
return at a price, with a 95 % interval over windows; costs are FLOPs and seconds, the exhaustive search as 1.
"""

from __future__ import annotations

import time

import torch

import duorl
from duorl.allocator import keep_freed_memory
from duorl.oracle import beam, best_of_random, descent, exhaustive, fixed_patterns
from duorl.oracle.patterns import pattern_losses
from duorl.statistics import bootstrap_interval

_WINDOWS, _PATTERN_WINDOWS, _LENGTH = 16, 32, 128
_PRICES = (0.0, 0.3)


def approximate_oracles(model: duorl.DuoForCausalLM, tokens: torch.Tensor, start: list[int]) -> None:
    """Print the table of searches per token."""
    started = time.perf_counter()
    table = exhaustive(model, tokens)
    exact_seconds = time.perf_counter() - started
    print("| search | regret at price 0 | regret at price 0.3 | FLOPs | time |\n|---|---:|---:|---:|---:|")
    print("| exhaustive | 0 | 0 | 1 | 1 |")
    generator = torch.Generator().manual_seed(0)
    searches = {
        **{f"beam, width {w}": lambda price, w=w: beam(model, tokens, width=w, price=price) for w in (1, 4, 16)},
        **{
            f"coordinate descent, {r} round(s)": lambda price, r=r: descent(
                model, tokens, start=start, rounds=r, price=price
            )
            for r in (1, 2, 4)
        },
        **{
            f"best of {n} random routes": lambda price, n=n: best_of_random(
                model, tokens, count=n, generator=generator, price=price
            )
            for n in (10, 30, 100)
        },
    }
    for name, search in searches.items():
        regrets = []
        for price in _PRICES:
            found, best = search(price), table.best(price)
            cost = found.losses + price * found.compute - table.loss(best) - price * table.compute[best]
            low, high = bootstrap_interval(cost.mean(1))
            regrets.append(f"{cost.mean():.3f} ({low:.3f}, {high:.3f})")
        costs = f"{found.flops / table.flops:.2f} | {found.seconds / exact_seconds:.2f}"
        print(f"| {name} | {' | '.join(regrets)} | {costs} |")


def patterns(model: duorl.DuoForCausalLM, windows: torch.Tensor, held_out: torch.Tensor) -> None:
    """Print the table of fixed patterns per number of big layers."""
    times, found = [], []
    for method in ("enumeration", "program"):
        started = time.perf_counter()
        found.append({p.budget[1]: p for p in fixed_patterns(model, windows, method=method)})
        times.append(time.perf_counter() - started)
    print(f"\nprogram / enumeration time {times[1] / times[0]:.2f}\n")
    print("| big layers | enumeration | program | regret | enumeration, held out | program, held out |")
    print("|---:|---:|---:|---:|---:|---:|")
    for big in sorted(found[0]):
        exact, program = (one[big] for one in found)
        deployed = pattern_losses(model, held_out, torch.tensor([exact.route, program.route])).tolist()
        print(
            f"| {big} | {exact.loss:.4f} | {program.loss:.4f} | {program.loss - exact.loss:.4f} | "
            f"{deployed[0]:.4f} | {deployed[1]:.4f} |"
        )


@torch.no_grad()
def main() -> None:
    """Measure and print tables in Markdown."""
    keep_freed_memory()
    model, tokenizer = duorl.load("duo-tiny"), duorl.load_tokenizer("duo-tiny")
    read = lambda split: duorl.load_windows("stdlib-code", tokenizer, split=split, length=_LENGTH)  # noqa: E731
    router, held_out = read("router")[:_PATTERN_WINDOWS], read("evaluation")[:_WINDOWS]
    start = next(p.route for p in fixed_patterns(model, router) if p.budget[1] == model.num_layers // 2)
    approximate_oracles(model, held_out, start)
    patterns(model, router, held_out)


if __name__ == "__main__":
    main()
