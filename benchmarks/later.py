"""What a choice of big changes for its own token, and for the tokens after it: a table of docs/explanation/learning.md.

    python -m benchmarks.later --model smollm2 --dtype bfloat16

Every token takes a base route: a random one, or that of a soft router which is trained first. In one layer, a quarter
of the tokens with small takes big, or the other way round. The change of their own losses is the effect on the own
token. The change of all other losses, divided by the number of changed tokens, is the effect on later tokens: a token
does not change what earlier ones read. The text is the router split.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import torch

import duorl
from benchmarks.record import record
from duorl.costs import BIG, SMALL
from duorl.envs import Lockstep, RoutingDynamics
from duorl.envs.later import Effect, effects
from duorl.evaluation import measure
from duorl.learners import Soft
from duorl.markdown import grid
from duorl.models.trainer import random_routes
from duorl.rewards import LossImprovement

Layers = list[dict[str, float]]
"""Per layer, what `duorl.envs.later.Effect` says; of layers with too few tokens, the share alone."""


def kept(effect: Effect) -> dict[str, float]:
    """The known numbers of an effect."""
    return {key: value for key, value in asdict(effect).items() if not math.isnan(value)}


def totals(layers: Layers) -> tuple[float, float, float]:
    """Sums over layers, weighted by the share of the tokens, in nats per token: own, later, error of later."""
    known = [layer for layer in layers if "own" in layer]
    own, later = (sum(layer["share"] * layer[key] for layer in known) for key in ("own", "later"))
    return own, later, sum((layer["share"] * layer["error"]) ** 2 for layer in known) ** 0.5


def markdown(found: dict[str, Layers], groups: int = 5) -> str:
    """A table: per base route, the two effects, summed over groups of layers: the first one, and the others."""
    rows = []
    for name, layers in found.items():
        size = -(-(len(layers) - 1) // (groups - 1))
        starts = [0, *range(1, len(layers), size)]
        for start, end in [*pairwise([*starts, len(layers)]), (0, len(layers))]:
            own, later, error = totals(layers[start:end])
            names = (
                "all"
                if (start, end) == (0, len(layers))
                else f"{start} to {end - 1}"
                if end - start > 1
                else f"{start}"
            )
            rows.append([name, names, f"{own:+.3f}", f"{later:+.3f} ± {error:.3f}"])
    return grid(("base route, change", "layers", "own token", "later tokens"), rows, numbers=(2, 3))


def main() -> None:
    """Measure, write the JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="duo-tiny")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--price", type=float, help="of the soft router; by default that of the model")
    parser.add_argument("--updates", type=int, default=120, help="of the soft router")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("runs/later.json"))
    options = parser.parse_args()
    model = duorl.load(options.model, dtype=getattr(torch, options.dtype))
    tokenizer = duorl.load_tokenizer(options.model)
    text = duorl.load_windows(["stdlib-code", "stdlib-docs"], tokenizer, split="router", length=128)
    text = text[torch.randperm(len(text), generator=torch.Generator().manual_seed(0))]
    windows, rest = text[: options.windows], text[options.windows :]
    price = options.price or model.config.price or 0.3
    soft = Soft(Lockstep(model, rest, windows_per_batch=8, reward=LossImprovement(price)), updates=options.updates)
    bases = {
        "random": random_routes(windows[:, 1:].numel(), model.num_layers, generator=torch.Generator().manual_seed(1)),
        "soft": measure(model, soft.learn(1), windows).routes,
    }
    found: dict[str, Layers] = {}
    for name, routes in bases.items():
        routes = routes.view(*windows[:, 1:].shape, -1)
        for change, codes in (("small to big", (SMALL, BIG)), ("big to small", (BIG, SMALL))):
            layers = effects(RoutingDynamics(model), windows, routes, chosen=codes[0], instead=codes[1])
            found[f"{name}, {change}"] = [kept(layer) for layer in layers]
    record(options.out, price=price, rows=found)
    print(markdown(found))


if __name__ == "__main__":
    main()
