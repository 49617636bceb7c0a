"""What a choice of big changes for its own token, and for the tokens after it: a table of docs/learning.md.

    python -m benchmarks.later --model smollm2 --dtype bfloat16

Every token takes a base route: a random one, or that of a soft router which is trained first. In one layer, a quarter
of the tokens with small takes big, or the other way round. The change of their own losses is the effect on the own
token. The change of all other losses, divided by the number of changed tokens, is the effect on later tokens: a token
does not change what earlier ones read. The text is the router split.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

import duorl
from duorl.costs import BIG, SMALL
from duorl.envs import Lockstep
from duorl.evaluation import measure
from duorl.learners import Soft
from duorl.models.trainer import random_routes
from duorl.rewards import LossImprovement
from duorl.routed_pass import RoutedPass

_CHANGED = 0.25  # of the tokens that can change
_LEAST = 30  # changed tokens, for an estimate


def effects(model: duorl.DuoForCausalLM, windows: Tensor, routes: Tensor, *, chosen: int, batch: int = 8) -> list[dict]:
    """Per layer, what big in place of small gains in nats, where the base routes have chosen one of the two.

    Args:
        model: a duo model.
        windows: (W, T+1).
        routes: (W, T, L), base routes.
        chosen: the action of the tokens that change, small or big.
        batch: windows per pass.

    Returns:
        Per layer `layer`; `share`, of the tokens with this action; `own` and `later`, nats per changed token, and
        `error`, the standard error of `later` over windows; these three are None where too few tokens can change.
    """
    generator = torch.Generator().manual_seed(0)
    can = routes == chosen
    changed = can & (torch.rand(routes.shape, generator=generator) < _CHANGED)
    rows: list[dict] = [
        {"layer": layer, "share": can[..., layer].float().mean().item()} for layer in range(routes.shape[-1])
    ]
    gains: list[list[Tensor]] = [[] for _ in rows]
    for tokens, base, flipped in zip(windows.split(batch), routes.split(batch), changed.split(batch), strict=True):
        walk = RoutedPass(model, tokens)
        branches = []
        while not walk.done:
            actions, flips = base[..., walk.layer], flipped[..., walk.layer]
            branch = walk.fork()
            branch.step(torch.where(flips, SMALL + BIG - actions, actions))
            branches.append(branch.follow(base).losses())
            walk.step(actions)
        for found, losses in zip(gains, branches, strict=True):
            found.append((walk.losses() - losses) * (1 if chosen == SMALL else -1))
    for row, found in zip(rows, gains, strict=True):
        gain, flips = torch.cat(found), changed[..., row["layer"]]
        count, others = flips.sum(), (gain * ~flips).sum(1)
        row |= dict.fromkeys(("own", "later", "error"))
        if count >= _LEAST:
            error = others.std() * len(others) ** 0.5 / count
            row |= {"own": gain[flips].mean().item(), "later": (others.sum() / count).item(), "error": error.item()}
    return rows


def totals(rows: list[dict]) -> dict[str, float]:
    """Sums over layers, weighted by the share of the tokens: nats per token."""
    known = [row for row in rows if row["own"] is not None]
    sums = {key: sum(row["share"] * row[key] for row in known) for key in ("own", "later")}
    return sums | {"error": sum((row["share"] * row["error"]) ** 2 for row in known) ** 0.5}


def markdown(found: dict[str, list[dict]], groups: int = 5) -> str:
    """A table: per base route and group of layers, the share of the tokens and the two effects, summed over layers."""
    lines = ["| base route, change | layers | own token | later tokens |", "|---|---|---:|---:|"]
    for name, rows in found.items():
        for part in (*_parts(rows, groups), rows):
            sums, first, last = totals(part), part[0]["layer"], part[-1]["layer"]
            layers = "all" if part is rows else f"{first} to {last}" if first < last else f"{first}"
            lines.append(f"| {name} | {layers} | {sums['own']:+.3f} | {sums['later']:+.3f} ± {sums['error']:.3f} |")
    return "\n".join(lines) + "\n"


def _parts(rows: list[dict], groups: int) -> list[list[dict]]:
    """The first layer, and the others in groups."""
    size = -(-(len(rows) - 1) // (groups - 1))
    return [rows[:1], *(rows[start : start + size] for start in range(1, len(rows), size))]


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
    found = {}
    with torch.no_grad():
        for name, routes in bases.items():
            routes = routes.view(*windows[:, 1:].shape, -1)
            found[f"{name}, small to big"] = effects(model, windows, routes, chosen=SMALL)
            found[f"{name}, big to small"] = effects(model, windows, routes, chosen=BIG)
    command = f"python -m benchmarks.later --model {options.model} --dtype {options.dtype}"
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"command": command, "price": price, "effects": found}, indent=1))
    print(markdown(found))


if __name__ == "__main__":
    main()
