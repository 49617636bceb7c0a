"""The time of a routed pass, in plain forward passes of the same model: `python benchmarks/rollout.py [threads ...]`.

A plain pass is the forward pass of transformers, with head and losses, of a model with alternating big and small
layers. It has the FFN FLOPs of a random rollout. All passes of a round run one after the other. The time of each is
divided by that of the plain pass in its round, so that a slow moment of the machine affects both.

- plain: one forward, all logits at once.
- plain, losses by rows: the same, with the head in parts that fit into a processor's cache, as in `RoutedPass`.
- constant walk: a `RoutedPass` along the same route.
- random rollout: a `RoutedPass` with a random action for every token and layer.
- all-big walk: twice the feed-forward FLOPs.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

import duorl
from duorl.costs import BIG, SMALL
from duorl.routed_pass import RoutedPass, head_rows

WINDOWS, LENGTH, ROUNDS = 16, 128, 25


def half_big(model: duorl.DuoForCausalLM) -> PreTrainedModel:
    """The decoder of transformers, with alternating small and big layers."""
    plain = copy.deepcopy(model.backbone)
    for layer, ffn in enumerate(model.stack.ffns):
        plain.base_model.layers[layer].mlp = ffn.big if route_of(model)[layer] == BIG else ffn.small
    return plain


def route_of(model: duorl.DuoForCausalLM) -> list[int]:
    """The constant route."""
    return [(SMALL, BIG)[layer % 2] for layer in range(model.num_layers)]


def passes(model: duorl.DuoForCausalLM, tokens: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The passes to be timed, by name; each returns losses."""
    plain, route, coins = half_big(model), route_of(model), torch.Generator().manual_seed(1)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].flatten()
    rows = head_rows(model.config.backbone.vocab_size, tokens.device)

    def walked(decide: Callable[[RoutedPass], None]) -> Tensor:
        walk = RoutedPass(model, tokens)
        while not walk.done:
            decide(walk)
        return walk.losses()

    def by_rows() -> Tensor:
        hidden = plain.base_model(input_ids=inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        parts = zip(hidden.split(rows), targets.split(rows), strict=True)
        return torch.cat([cross_entropy(plain.lm_head(x), y, reduction="none") for x, y in parts])

    def coin(walk: RoutedPass) -> Tensor:
        return torch.randint(SMALL, BIG + 1, walk.compute.shape, generator=coins)

    return {
        "plain": lambda: cross_entropy(plain(inputs, use_cache=False).logits.flatten(0, 1), targets, reduction="none"),
        "plain, losses by rows": by_rows,
        "constant walk": lambda: walked(lambda walk: walk.take(route[walk.layer])),
        "random rollout": lambda: walked(lambda walk: walk.step(coin(walk))),
        "all-big walk": lambda: walked(lambda walk: walk.take(BIG)),
    }


def measured(runs: dict[str, Callable[[], Tensor]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds in every round, after a warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if number:
                times[name].append(time.perf_counter() - started)
    return times


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    model = duorl.load("duo-tiny")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.backbone.vocab_size, (WINDOWS, LENGTH + 1), generator=generator)
    for threads in [int(word) for word in sys.argv[1:]] or [torch.get_num_threads()]:
        torch.set_num_threads(threads)
        times = measured(passes(model, tokens))
        print(f"{threads} threads, {WINDOWS * LENGTH} tokens, {ROUNDS} rounds: median and quartiles")
        for name, seconds in times.items():
            ratios = [ours / plain for ours, plain in zip(seconds, times["plain"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            print(f"  {name:22} {statistics.median(seconds) * 1000:6.1f} ms  x {middle:.3f} ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
