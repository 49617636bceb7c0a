"""The time of a routed pass, in plain forward passes of the same model: `python benchmarks/rollout.py [threads ...]`.

A plain pass is the forward pass of transformers, with head and losses, of a model that has one network per layer. It
alternates small and big layers, so it has the FFN FLOPs of a random rollout; all-big and all-small walks are compared
with plain passes of their own. All passes of a round run one after the other. The time of each is divided by that of
its plain pass in its round, so that a slow moment of the machine affects both. With one thread, time is the
processor's, which other programs disturb less.

- plain: one forward, all logits at once.
- plain, losses by rows: the same, with the head in parts that fit into a processor's cache, as in `RoutedPass`.
- constant walk: a `RoutedPass` along the same route.
- random rollout: a `RoutedPass` with a random action for every token and layer.
- ... without head: only the layers; a deep model with a large vocabulary spends a third of its time in the head.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

import duorl
from duorl.costs import BIG, SMALL
from duorl.models.families import find_layers
from duorl.models.footprint import head_rows
from duorl.routed_pass import RoutedPass
from duorl.runs.allocator import keep_freed_memory

Run = Callable[[], Tensor]


def fixed(model: duorl.DuoForCausalLM, route: list[int]) -> PreTrainedModel:
    """The decoder of transformers with the networks of a route; weights are shared with the duo."""
    memo = {id(tensor): tensor for tensor in (*model.backbone.parameters(), *model.backbone.buffers())}
    plain = copy.deepcopy(model.backbone, memo)
    for layer, ffn, action in zip(find_layers(plain), model.stack.ffns, route, strict=True):
        setattr(layer, model.stack.family.ffn, ffn.big if action == BIG else ffn.small)
    return plain


def alternating(model: duorl.DuoForCausalLM) -> list[int]:
    """The route small, big, small, ..."""
    return [(SMALL, BIG)[layer % 2] for layer in range(model.num_layers)]


def plain_pass(model: duorl.DuoForCausalLM, tokens: Tensor, route: list[int] | None = None) -> Run:
    """A forward pass of transformers with losses, (B * T,), all logits at once."""
    plain, inputs, targets = fixed(model, route or alternating(model)), tokens[:, :-1], tokens[:, 1:].flatten()

    def run() -> Tensor:
        logits = plain(inputs, use_cache=False).logits.flatten(0, 1)
        return cross_entropy(logits.float(), targets, reduction="none")

    return run


def passes(model: duorl.DuoForCausalLM, tokens: Tensor) -> dict[str, tuple[Run, str]]:
    """The passes to be timed and the plain pass that each is compared with, by name."""
    route, coins = alternating(model), torch.Generator(model.device).manual_seed(1)
    plains = {"plain": route, "plain all-big": [BIG] * len(route), "plain all-small": [SMALL] * len(route)}
    decoders = {name: fixed(model, taken).base_model for name, taken in plains.items()}
    inputs, targets = tokens[:, :-1], tokens[:, 1:].flatten()
    rows = head_rows(model.config.backbone.vocab_size, tokens.device)

    def states(name: str) -> Tensor:
        return decoders[name](input_ids=inputs, use_cache=False).last_hidden_state.flatten(0, 1)

    def by_rows() -> Tensor:
        parts = zip(states("plain").split(rows), targets.split(rows), strict=True)
        head = model.backbone.get_output_embeddings()
        return torch.cat([cross_entropy(head(x).float(), y, reduction="none") for x, y in parts])

    def walked(decide: Callable[[RoutedPass], None]) -> RoutedPass:
        walk = RoutedPass(model, tokens)
        while not walk.done:
            decide(walk)
        return walk

    def coin(walk: RoutedPass) -> None:
        walk.step(torch.randint(SMALL, BIG + 1, walk.compute.shape, generator=coins, device=coins.device))

    return {
        "plain": (plain_pass(model, tokens), "plain"),
        "plain, losses by rows": (by_rows, "plain"),
        "constant walk": (lambda: walked(lambda walk: walk.take(route[walk.layer])).losses(), "plain"),
        "random rollout": (lambda: walked(coin).losses(), "plain"),
        **{f"{name}, without head": (lambda name=name: states(name), "plain, without head") for name in plains},
        "random, without head": (lambda: walked(coin).residual, "plain, without head"),
        "all-big walk, without head": (
            lambda: RoutedPass(model, tokens).take_all(BIG).residual,
            "plain all-big, without head",
        ),
        "all-small walk, without head": (
            lambda: RoutedPass(model, tokens).take_all(SMALL).residual,
            "plain all-small, without head",
        ),
    }


def seconds(run: Callable[[], object]) -> float:
    """Processor time with one thread; wall time with more, or on a GPU."""
    gpu = torch.cuda.is_initialized()
    clock = time.process_time if torch.get_num_threads() == 1 and not gpu else time.perf_counter
    started = clock()
    run()
    if gpu:
        torch.cuda.synchronize()
    return clock() - started


def measured(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Seconds in every round, after a warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            taken = seconds(run)
            if number:
                times[name].append(taken)
    return times


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("threads", type=int, nargs="*")
    parser.add_argument("--model", default="duo-tiny")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=25)
    options = parser.parse_args()
    keep_freed_memory()
    model = duorl.load(options.model, dtype=options.dtype, device=options.device)
    generator, shape = torch.Generator().manual_seed(0), (options.windows, options.length + 1)
    tokens = torch.randint(model.config.backbone.vocab_size, shape, generator=generator).to(model.device)
    for threads in options.threads or [torch.get_num_threads()]:
        torch.set_num_threads(threads)
        runs = passes(model, tokens)
        times = measured({name: run for name, (run, _) in runs.items()}, options.rounds)
        about = f"{options.model} in {options.dtype} on {options.device}, {options.windows * options.length} tokens"
        print(f"{about}, {threads} threads, {options.rounds} rounds: median and quartiles")
        for name, seconds in times.items():
            ratios = [ours / plain for ours, plain in zip(seconds, times[runs[name][1]], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            milliseconds = f"{statistics.median(seconds) * 1000:7.1f} ms"
            print(f"  {name:30} {milliseconds}  x {middle:.3f} ({low:.3f} to {high:.3f})", flush=True)


if __name__ == "__main__":
    main()
