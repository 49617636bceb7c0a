"""Compares approximate oracles and pattern searches with the exhaustive ones: `python benchmarks/approximate.py`.

With `--model FOLDER`, it compares the pattern searches of a deep model with each other.

It uses held-out text and duo-tiny in the reference context, where the exact optimum is known. Regrets are in nats of
return at a price, with a 95 % interval over files. Costs are FLOPs and processor seconds, divided by those of the
exhaustive search. Fixed patterns are also searched in a random model of 12 layers, in which layers depend on each other
more than in a trained one.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import duorl
from duorl.corpus import Windows, read_windows
from duorl.evaluation.statistics import estimate
from duorl.oracle import beam, best_of_random, descent, exhaustive, fixed_patterns
from duorl.oracle.patterns import pattern_losses
from duorl.runs.allocator import keep_freed_memory

_WINDOWS, _PATTERN_WINDOWS, _LENGTH = 16, 32, 128
_FEW = 4  # windows for a deep model
_PRICES = (0.0, 0.3)


def approximate_oracles(model: duorl.DuoForCausalLM, windows: Windows, starts: list[list[int]]) -> None:
    """Print the table of searches per token."""
    started, tokens, middle = time.process_time(), windows.tokens, starts[len(starts) // 2]
    table = exhaustive(model, tokens)
    exact_seconds = time.process_time() - started
    print("| search | regret at price 0 | regret at price 0.3 | FLOPs | time |\n|---|---:|---:|---:|---:|")
    print("| exhaustive | 0 | 0 | 1 | 1 |")
    generator = torch.Generator().manual_seed(0)
    searches = {
        **{f"beam, width {w}": lambda price, w=w: beam(model, tokens, width=w, price=price) for w in (1, 4, 16)},
        **{
            f"coordinate descent, {r} round(s)": lambda price, r=r: descent(
                model, tokens, start=middle, rounds=r, price=price
            )
            for r in (1, 2, 4)
        },
        "coordinate descent, 2 round(s), from the best of all patterns": lambda price: descent(
            model, tokens, start=starts, price=price
        ),
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
            started, found, best = time.process_time(), search(price), table.best(price)
            seconds = time.process_time() - started
            cost = found.losses + price * found.compute - table.loss(best) - price * table.compute[best]
            regret = estimate(cost.mean(1), windows.files)
            low, high = regret.interval or (regret.value, regret.value)
            regrets.append(f"{regret.value:.3f} ({low:.3f}, {high:.3f})")
        costs = f"{found.flops / table.flops:.2f} | {seconds / exact_seconds:.2f}"
        print(f"| {name} | {' | '.join(regrets)} | {costs} |")


def patterns(
    name: str, model: duorl.DuoForCausalLM, windows: torch.Tensor, held_out: torch.Tensor, methods: Sequence[str]
) -> None:
    """Print the table of fixed patterns per number of big layers; differences are to the first method."""
    times, found = [], []
    for method in methods:
        started = time.process_time()
        found.append({p.budget[1]: p for p in fixed_patterns(model, windows, method=method)})
        times.append(time.process_time() - started)
    first, *others = methods
    shares = [f"{method} {seconds / times[0]:.2f}" for method, seconds in zip(others, times[1:], strict=True)]
    print(f"\n{name}: time as a share of {first}: {', '.join(shares)}\n")
    minus = [f"{method} - {first}" for method in others]
    print(f"| big layers | {' | '.join([*methods, *minus, *(f'{method}, held out' for method in methods)])} |")
    print(f"|{'---:|' * (2 * len(methods) + len(others) + 1)}")
    for big in sorted(found[0]):
        losses = [one[big].loss for one in found]
        deployed = pattern_losses(model, held_out, torch.tensor([one[big].route for one in found])).tolist()
        cells = [*losses, *(loss - losses[0] for loss in losses[1:]), *deployed]
        print(f"| {big} | {' | '.join(f'{cell:.4f}' for cell in cells)} |", flush=True)


def random_model() -> tuple[duorl.DuoForCausalLM, torch.Tensor]:
    """A duo of 12 layers with random weights, and random tokens (4, 33)."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    original = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=12, **sizes))
    for parameter in original.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return duorl.convert(original.eval(), small_ratio=4), torch.randint(256, (4, 33))


@torch.no_grad()
def main() -> None:
    """Measure and print tables in Markdown."""
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--model", default="duo-tiny", help="a duo model; if it is not duo-tiny, only patterns")
    name = parser.parse_args().model
    model, tokenizer = duorl.load(name), duorl.load_tokenizer(name)
    read = lambda split: read_windows("stdlib-code", tokenizer, split=split, length=_LENGTH)  # noqa: E731
    router, held_out = read("router").tokens[:_PATTERN_WINDOWS], read("evaluation").first(_WINDOWS)
    if name != "duo-tiny":
        patterns(name, model, router[:_FEW], held_out.tokens[:_FEW], ("greedy", "program"))
        return
    methods = ("enumeration", "program", "greedy")
    patterns(name, model, router, held_out.tokens, methods)
    random, tokens = random_model()
    patterns("12 random layers", random, tokens[:2], tokens[2:], methods)
    approximate_oracles(model, held_out, [p.route for p in fixed_patterns(model, router, method="greedy")])


if __name__ == "__main__":
    main()
