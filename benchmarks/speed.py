"""Ratios measured in one run: `python benchmarks/speed.py`.

- grouped execution against computing every network and selecting;
- an all-small pass against an all-big one: the largest saving that routing can reach.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import duorl
from duorl.models import DuoFFN


def seconds(run: Callable[[], object], repeats: int = 5) -> float:
    """Median wall time after one warm-up."""
    run()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def compute_and_select(ffn: DuoFFN, hidden: Tensor, actions: Tensor) -> Tensor:
    """Every network on every token, then a selection; grouped execution avoids this."""
    both = torch.stack([ffn.small(hidden), ffn.big(hidden)])
    return both.gather(0, (actions - 1)[None, ..., None].expand(1, *hidden.shape)).squeeze(0)


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    model = duorl.load("duo-tiny")
    generator = torch.Generator().manual_seed(0)
    ffn, hidden = model.stack.ffns[0], torch.randn(16, 128, model.hidden_size, generator=generator)
    for share in (0.1, 0.5, 0.9):
        actions = 1 + (torch.rand(16, 128, generator=generator) < share).long()
        grouped = seconds(lambda a=actions: ffn.route(hidden, a), repeats=20)
        everything = seconds(lambda a=actions: compute_and_select(ffn, hidden, a), repeats=20)
        print(f"FFN, {share:.0%} big: compute-and-select / grouped time {everything / grouped:.2f}")

    batch = torch.randint(model.config.backbone.vocab_size, (16, 128), generator=generator)
    times = {
        action: seconds(lambda a=action: model(input_ids=batch, routes=torch.full((16, 128, model.num_layers), a)))
        for action in (1, 2)
    }
    print(f"whole pass: all-small / all-big time {times[1] / times[2]:.2f}")


if __name__ == "__main__":
    main()
