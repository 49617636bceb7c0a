"""Two ways to run routed networks: grouped by action, or all networks on all tokens and a selection.

    python -m benchmarks.groups
    python -m benchmarks.groups --models 135m 1b "8b, 8 layers" --dtype bfloat16 --device cuda --threads 4

The passes are of the layers without the head; every token and layer draws its action. A router decides in every layer,
so the sizes of the groups are not known before. *Chosen* is what the model does by itself. All passes of a round run
one after the other; times are medians over rounds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import record
from benchmarks.rollout import measured
from benchmarks.shapes import load
from duorl.costs import SMALL, linear_flops
from duorl.markdown import grid
from duorl.models import DuoFFN, DuoForCausalLM
from duorl.routed_pass import RoutedPass
from duorl.runs.allocator import keep_freed_memory

WINDOW = 128
TOKENS = (128, 512, 2048, 8192)  # of a pass, by default
KINDS: dict[str, Callable[[DuoFFN, Tensor], bool] | None] = {
    "groups": lambda ffn, tokens: False,
    "selection": lambda ffn, tokens: True,
    "chosen": None,
}


@contextmanager
def only(rule: Callable[[DuoFFN, Tensor], bool] | None) -> Iterator[None]:
    """Replace the rule by which networks run on all tokens."""
    own: Any = DuoFFN.cheaper_than_waiting
    DuoFFN.cheaper_than_waiting = rule or own  # type: ignore[method-assign]
    try:
        yield
    finally:
        DuoFFN.cheaper_than_waiting = own  # type: ignore[method-assign]


def passes(model: DuoForCausalLM, tokens: int, share: float) -> dict[str, Callable[[], Tensor]]:
    """A routed pass by kind; `share` of the tokens are big."""
    generator = torch.Generator().manual_seed(0)
    vocabulary, layers = model.config.backbone.vocab_size, model.num_layers
    count, length = max(1, tokens // WINDOW), min(tokens, WINDOW)
    windows = torch.randint(vocabulary, (count, length + 1), generator=generator).to(model.device)
    drawn = torch.rand((layers, count, length), generator=generator)
    actions = (SMALL + (drawn < share).long()).to(model.device)

    def run(kind: str) -> Tensor:
        walk = RoutedPass(model, windows)
        with only(KINDS[kind]):
            for chosen in actions:
                walk.step(chosen)
        return walk.residual

    return {kind: lambda kind=kind: run(kind) for kind in KINDS}


@torch.no_grad()
def rows(name: str, model: DuoForCausalLM, rounds: int, share: float, sizes: Sequence[int] = TOKENS) -> list[dict]:
    """A row per number of tokens: milliseconds of each kind."""
    table = []
    for tokens in sizes:
        times = measured(passes(model, tokens, share), rounds)
        work = linear_flops(model.stack.ffns[0]) * tokens
        table.append(
            {"model": name, "tokens": tokens, "flops": work}
            | {kind: 1000 * statistics.median(seconds) for kind, seconds in times.items()}
        )
    return table


def markdown(table: list[dict]) -> str:
    """The rows as a table."""
    lines = [
        [row["model"], f"{row['tokens']:,}", f"{row['flops'] / 1e9:,.1f}", *(f"{row[kind]:,.1f}" for kind in KINDS)]
        for row in table
    ]
    head = ("model", "tokens", "10^9 FLOPs of a layer's networks", *(f"{kind}, ms" for kind in KINDS))
    return grid(head, lines, numbers=range(1, len(head)))


def main() -> None:
    """Measure, write the JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["duo-tiny"], help="see benchmarks/shapes.py")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS, help="of a pass")
    parser.add_argument("--share", type=float, default=0.5, help="of the tokens that are big")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("runs/groups.json"))
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    found = []
    for name in options.models:
        model = load(name, getattr(torch, options.dtype), options.device)
        found += rows(name, model, options.rounds, options.share, options.tokens)
    record(options.out, rows=found)
    print(markdown(found))


if __name__ == "__main__":
    main()
