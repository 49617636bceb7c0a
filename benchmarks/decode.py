"""The time of generation and of long prompts with a router, against the original model of transformers.

    python -m benchmarks.decode --model smollm2 --dtype bfloat16

Every round runs all cases one after the other, so that a slow moment of the machine affects all. *Speed* is the
original's time divided by the case's: medians and quartiles over rounds. *Of FLOPs saved* is the share of time saved,
against the original, divided by the share of FLOPs saved, with attention and head. The routes are fixed patterns whose
big layers are spread evenly, and random ones per token, at the same compute. *Of plain* compares a pattern with a model
of transformers that has just the networks of this pattern, and no router: no routing of it can be faster.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.record import record
from benchmarks.rollout import fixed, measured
from benchmarks.shapes import load
from duorl.costs import BIG, SMALL
from duorl.markdown import grid
from duorl.models import DuoForCausalLM
from duorl.routers import PatternRouter, Router
from duorl.runs.allocator import keep_freed_memory

SHARES = (0.25, 0.5, 0.75)  # of the compute
PROMPT, NEW = 16, 16  # tokens
LONG = 2048
BATCHES = (1, 8, 32)


class Coins(Router):
    """Draws big with a given probability."""

    def __init__(self, probability: float, device: torch.device):
        super().__init__()
        self.probability, self.generator = probability, torch.Generator(device).manual_seed(0)

    def forward(self, hidden: Tensor, layer: int, compute: Tensor) -> Tensor:
        """(...), drawn anew."""
        drawn = torch.rand(hidden.shape[:-1], generator=self.generator, device=hidden.device) < self.probability
        return torch.where(drawn, BIG, SMALL)


def spread(model: DuoForCausalLM, share: float) -> PatternRouter:
    """The pattern with at most this compute and its big layers at equal distances."""
    layers, small = model.num_layers, model.flops.compute[0, SMALL] / model.flops.compute[0, BIG]
    count = int(layers * (share - small) / (1 - small))
    chosen = {round((place + 0.5) * layers / count - 0.5) for place in range(count)}
    return PatternRouter([BIG if layer in chosen else SMALL for layer in range(layers)])


def routers(model: DuoForCausalLM) -> dict[str, tuple[Router, float]]:
    """The routers and their compute."""
    small = model.flops.compute[:, SMALL].sum().item()
    found: dict[str, tuple[Router, float]] = {
        "all-big": (PatternRouter([BIG] * model.num_layers), 1.0),
        "all-small": (PatternRouter([SMALL] * model.num_layers), small),
    }
    for share in SHARES:
        pattern = spread(model, share)
        found[f"pattern {share:g}"] = pattern, model.route_compute(torch.tensor(pattern.config["route"])).item()
        found[f"random {share:g}"] = Coins((share - small) / (1 - small), model.device), share
    return found


def rows(model: DuoForCausalLM, rounds: int, batches: tuple[int, ...], long: int) -> list[dict]:
    """A row per case and router."""
    known = routers(model)
    routes = {name: router.config["route"] for name, (router, _) in known.items() if "route" in router.config}
    plains = {f"plain {name}": fixed(model, route) for name, route in routes.items()}
    generator = torch.Generator().manual_seed(0)
    vocabulary, table = model.config.backbone.vocab_size, []
    each = [(name, router) for name, (router, _) in known.items()]

    def ids(batch: int, length: int) -> Tensor:
        return torch.randint(5, vocabulary, (batch, length), generator=generator).to(model.device)

    def decode(prompts: Tensor) -> dict[str, Callable]:
        options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
        options["attention_mask"] = torch.ones_like(prompts)
        runs: dict[str, Callable] = {
            name: lambda m=plain: m.generate(prompts, **options) for name, plain in plains.items()
        }
        return runs | {name: lambda r=router: model.generate(prompts, router=r, **options) for name, router in each}

    def prefill(prompts: Tensor) -> dict[str, Callable]:
        keep = {"logits_to_keep": 1, "use_cache": True}
        runs: dict[str, Callable] = {
            name: lambda m=plain: m(input_ids=prompts, **keep) for name, plain in plains.items()
        }
        return runs | {name: lambda r=router: model(input_ids=prompts, router=r, **keep) for name, router in each}

    cases = {f"decode, batch {batch}": (decode(ids(batch, PROMPT)), PROMPT + NEW / 2, batch * NEW) for batch in batches}
    cases[f"prompt of {long}"] = prefill(ids(1, long)), long / 2, long
    for case, (runs, context, tokens) in cases.items():
        times = measured(runs, rounds)
        for name, (_, compute) in known.items():
            table.append({"case": case, "router": name, **_ratios(model, times, name, compute, context, tokens)})
    return table


def _ratios(
    model: DuoForCausalLM, times: dict[str, list[float]], name: str, compute: float, context: float, tokens: int
) -> dict:
    big, own = model.flops.token(torch.tensor([1.0, compute]), context).tolist()
    speeds, plains = (
        [plain / ours for plain, ours in zip(times[one], times[name], strict=True)] if one in times else None
        for one in ("plain all-big", f"plain {name}")
    )
    low, middle, high = statistics.quantiles(speeds, n=4)
    saved = 1 - own / big
    return {
        "compute": compute,
        "tokens_per_second": tokens / statistics.median(times[name]),
        "speed": [middle, low, high],
        "of_plain": None if plains is None else statistics.median(plains),
        "flops_saved": saved,
        "of_flops_saved": (1 - 1 / middle) / saved if saved > 0.01 else None,
    }


def markdown(table: list[dict]) -> str:
    """The rows as a table."""
    lines = []
    for row in table:
        middle, low, high = row["speed"]
        share = "" if row["of_flops_saved"] is None else f"{row['of_flops_saved']:.2f}"
        speed = f"{middle:.2f} ({low:.2f} to {high:.2f})"
        plain = "" if row["of_plain"] is None else f"{row['of_plain']:.2f}"
        numbers = [
            f"{row['compute']:.2f}",
            f"{row['tokens_per_second']:,.1f}",
            speed,
            plain,
            f"{row['flops_saved']:.2f}",
        ]
        lines.append([row["case"], row["router"], *numbers, share])
    head = ("case", "router", "compute", "tokens/s", "speed", "of plain", "FLOPs saved", "time saved, of FLOPs saved")
    return grid(head, lines, numbers=range(2, 8))


@torch.no_grad()
def main() -> None:
    """Measure, write the JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="duo-tiny", help="a duo model, or 1b")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, nargs="*", default=BATCHES)
    parser.add_argument("--long", type=int, default=LONG, help="tokens of the long prompt")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("runs/decode.json"))
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    model = load(options.model, getattr(torch, options.dtype), options.device)
    table = rows(model, options.rounds, tuple(options.batches), options.long)
    record(options.out, rows=table)
    print(markdown(table))


if __name__ == "__main__":
    main()
