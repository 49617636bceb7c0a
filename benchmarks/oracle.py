"""The speed of the exhaustive search: `python benchmarks/oracle.py`.

It measures for each case, in one process and with alternating runs:

- FLOPs and time of naive enumeration, one full forward pass per route, divided by those of the search. The goal is a
  time ratio of at least 0.9 of the FLOP ratio;
- FLOPs per second of the search, divided by the peak of the machine's matrix multiplication. The goal is 60 %.

In the large cases, naive enumeration is timed on some of the routes, and the time is scaled up.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple, get_args

import torch
from torch import Tensor
from transformers import LlamaConfig

import duorl
from duorl.models import DuoConfig
from duorl.oracle import SearchContext, all_routes, exhaustive, tree_flops
from duorl.runs.allocator import keep_freed_memory

_PEAK_SIZE = 2048
_TOKENS = 128
_ROUNDS = 5
_TRIED = 16  # routes of naive enumeration that are timed


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one run, in seconds."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def random_duo(layers: int, **sizes: int) -> duorl.DuoForCausalLM:
    """A duo model with the sizes of duo-tiny, but another number of layers and other `sizes`, and random weights."""
    backbone = duorl.load("duo-tiny").config.backbone.to_dict() | {"num_hidden_layers": layers, **sizes}
    torch.manual_seed(0)
    model = duorl.DuoForCausalLM(DuoConfig(backbone=LlamaConfig.from_dict(backbone), small_size=48))
    return model.eval().requires_grad_(False)


def naive_flops(model: duorl.DuoForCausalLM, actions: tuple[str, ...], positions: int) -> float:
    """FLOPs of one token in all A^L full passes."""
    routes = all_routes(model.num_layers, actions)
    flops = model.flops
    networks = flops.ffns[torch.arange(model.num_layers), routes].sum().item()
    attention = sum(flops.attention(layer, positions) for layer in range(model.num_layers))
    return networks + len(routes) * (attention + flops.head)


def naive(model: duorl.DuoForCausalLM, inputs: Tensor, routes: Tensor) -> None:
    """Run one full forward pass per route, with the same route for every token, and compute the losses."""
    for route in routes:
        logits = model(input_ids=inputs, routes=route.expand(*inputs.shape, -1)).logits.flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, inputs.flatten(), reduction="none")


class Search(NamedTuple):
    """How fast a search is."""

    per_token: float  # seconds
    flop_ratio: float  # of naive enumeration to the search
    time_ratio: float
    speed: float  # FLOPs per second
    peak: float  # FLOPs per second of the machine


@torch.no_grad()
def measure(
    model: duorl.DuoForCausalLM, actions: tuple[str, ...], context: SearchContext, windows: int, rounds: int = _ROUNDS
) -> Search:
    """Measure one case."""
    generator, length = torch.Generator().manual_seed(0), _TOKENS // windows
    tokens = torch.randint(model.config.backbone.vocab_size, (windows, length + 1), generator=generator)
    square = torch.randn(_PEAK_SIZE, _PEAK_SIZE, generator=generator)
    routes = all_routes(model.num_layers, actions)
    tried = routes[torch.randperm(len(routes), generator=generator)[:_TRIED]]
    searches, enumerations, products = [], [], []
    flops = exhaustive(model, tokens, context=context, actions=actions).flops
    for _ in range(rounds):
        products += [seconds(lambda: square @ square) for _ in range(3)]
        searches.append(seconds(lambda: exhaustive(model, tokens, context=context, actions=actions)))
        enumerations.append(seconds(lambda: naive(model, tokens[:, :-1], tried)) * len(routes) / len(tried))
    per_token = min(searches) / tokens[:, 1:].numel()
    time_ratio = min(enumerations) / min(searches)
    flop_ratio = naive_flops(model, actions, length) / tree_flops(model, actions, length)
    peak = 2 * _PEAK_SIZE**3 / min(products)
    return Search(per_token, flop_ratio, time_ratio, flops / min(searches), peak)


def line(name: str, context: SearchContext, found: Search) -> str:
    """A line of the table."""
    return (
        f"| {name} | {context} | {1e3 * found.per_token:.2f} | {found.flop_ratio:.2f} | {found.time_ratio:.2f} | "
        f"{found.time_ratio / found.flop_ratio:.2f} | {found.speed / 1e9:.0f} | {found.peak / 1e9:.0f} | "
        f"{found.speed / found.peak:.0%} |"
    )


def main() -> None:
    """Measure and print a table in Markdown."""
    keep_freed_memory()
    print("| routes | context | ms per token | FLOP ratio | time ratio | of it | GFLOP/s | peak | share of peak |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    tiny, deep, both = duorl.load("duo-tiny"), random_duo(12), ("small", "big")
    for context in get_args(SearchContext):
        print(line("2^8", context, measure(tiny, both, context, windows=1 if context != "routed" else 16)))
    print(line("2^12", "reference", measure(deep, both, "reference", windows=1)))
    print(line("3^8", "reference", measure(tiny, ("skip", *both), "reference", windows=1)))


if __name__ == "__main__":
    main()
