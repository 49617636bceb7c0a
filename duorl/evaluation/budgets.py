"""Routers at equal compute: their frontiers over a ladder of prices, with seeds, files and paired tests.

A router for a range of prices is measured at several prices; for fixed patterns, the best one of every number of big
layers is measured. These measurements are a `Ladder`. A deployment can mix two steps of a ladder, so the loss at a
given compute is interpolated linearly. All routers of a table then have exactly the same compute, and are compared on
the same windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from duorl.evaluation.measure import Measurement, measure, stacked, top1_agreement
from duorl.evaluation.statistics import Estimate, as_share, estimate, holm, hypervolume, named, reaches
from duorl.models.modeling import DuoForCausalLM
from duorl.routers import ConstantRouter, Router, spent

Row = dict[str, Any]


@dataclass(frozen=True)
class Ladder:
    """One router at several budgets, in the routed context.

    Attributes:
        spent: (P, W), mean compute of each window at each step, in [0, 1].
        losses: (P, W), nats per token, the mean of each window.
        top1_agreement: (P, W), share of tokens whose most likely next token is all-big's; None: not measured.
        seconds: (P, N), wall time per token of each batch; None: not measured.
        calibration: (P,), mean compute at each step on router text of the same kind; None: not measured.
    """

    spent: Tensor
    losses: Tensor
    top1_agreement: Tensor | None = None
    seconds: Tensor | None = None
    calibration: Tensor | None = None

    @classmethod
    def climb(
        cls,
        model: DuoForCausalLM,
        steps: Sequence[Router],
        windows: Tensor,
        calibrate_on: Tensor | None = None,
        between: Callable[[], None] = lambda: None,
    ) -> Ladder:
        """Measure routers, one per step, on windows (W, T+1), and their compute on router text, (W', T+1).

        `between` is called after each measurement.
        """

        def measured_on(router: Router) -> Measurement:
            found = measure(model, router, windows)
            between()
            return found

        all_big = measured_on(ConstantRouter("big")).predicted
        measured = stacked([measured_on(router) for router in steps])
        agreement = top1_agreement(measured.predicted, all_big)
        found = cls(measured.compute.mean(-1), measured.loss.mean(-1), agreement, measured.seconds)
        if calibrate_on is None:
            return found
        return replace(found, calibration=torch.tensor([spent(model, router, calibrate_on) for router in steps]))

    @property
    def compute(self) -> Tensor:
        """(P,), means over windows."""
        return self.spent.mean(1)

    @property
    def calibrated(self) -> Tensor:
        """(P,), see `calibration`; it must be measured."""
        assert self.calibration is not None
        return self.calibration

    @property
    def loss(self) -> Tensor:
        """(P,) nats, means over windows."""
        return self.losses.mean(1)

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        save_file({name: values for name, values in vars(self).items() if values is not None}, path)

    @classmethod
    def load(cls, path: Path) -> Ladder:
        """Load a ladder; older files have only losses and the mean compute, which is then used for every window."""
        found = load_file(path)
        if "spent" not in found:
            return cls(found["compute"][:, None].expand_as(found["losses"]).contiguous(), found["losses"])
        return cls(**found)


Ladders = Mapping[str, Sequence[Ladder]]
"""For each router, one ladder per training seed."""


def budget_rows(ladders: Ladders, targets: Sequence[float], files: Tensor | None = None) -> list[Row]:
    """Rows for each target compute and router.

    Args:
        ladders: ladders by router.
        targets: values of the compute.
        files: (W,), file of each window.

    Returns:
        Rows with `router`, `seeds`, `target`, `compute` (the target: all are interpolated to it), `loss` in nats,
        `top1_agreement` and `tokens_per_second`, each with its `NAME_interval`, and `minus`: by rival the paired
        `difference` of losses (below 0 is better than the rival), its `interval`, its two-sided `p`, and whether it
        `holds` by Holm's procedure over all routers and targets that are compared with this rival. If a router does not
        reach the target, all of these are None, and `spends` is the range of its compute. See
        `duorl.evaluation.statistics` for intervals and tests.
    """
    rows = [row for target in targets for row in _rows_at(ladders, target, files)]
    for rival in ladders:
        family = [row["minus"][rival] for row in rows if rival in row["minus"]]
        for difference, holds in zip(family, holm([one["p"] for one in family]), strict=True):
            difference["holds"] = holds
    return rows


def _rows_at(ladders: Ladders, target: float, files: Tensor | None) -> list[Row]:
    reached = {name: loss_at(seeds, target, files) for name, seeds in ladders.items()}
    return [
        {
            "router": name,
            "seeds": len(ladders[name]),
            "target": target,
            "spends": _range(ladders[name]),
            "compute": None if loss is None else target,
            **named("loss", loss),
            **named("top1_agreement", agreement_at(ladders[name], target, files), as_share),
            **named("tokens_per_second", speed_at(ladders[name], target), math.exp),
            "minus": {
                rival: minus(loss, other)
                for rival, other in reached.items()
                if rival != name and loss is not None and other is not None
            },
        }
        for name, loss in reached.items()
    ]


def loss_at(seeds: Sequence[Ladder], target: float, files: Tensor | None = None) -> Estimate | None:
    """Mean loss over seeds at a compute, in nats; None if a seed does not reach it."""
    return _at(seeds, target, [ladder.losses for ladder in seeds], files)


def agreement_at(seeds: Sequence[Ladder], target: float, files: Tensor | None = None) -> Estimate | None:
    """Mean share of tokens whose most likely next token is all-big's, at a compute; None: see `loss_at`."""
    return _at(seeds, target, [ladder.top1_agreement for ladder in seeds], files)


def speed_at(seeds: Sequence[Ladder], target: float) -> Estimate | None:
    """Logarithm of the tokens per second at a compute; its interval is over seeds and batches. None: see `loss_at`."""
    values = [one.seconds for one in seeds if one.seconds is not None]
    if len(values) < len(seeds) or not _reached(seeds, target):
        return None
    by_batch = [replace(one, spent=one.compute[:, None].expand_as(own)) for one, own in zip(seeds, values, strict=True)]
    return _interpolated(by_batch, values, None, lambda *found: -math.log(np.interp(target, *_rising(*found))))


def _at(
    seeds: Sequence[Ladder], target: float, values: Sequence[Tensor | None], files: Tensor | None
) -> Estimate | None:
    """The mean of values (P, W) at a compute."""
    known = [value for value in values if value is not None]
    if len(known) < len(seeds) or not _reached(seeds, target):
        return None
    return _interpolated(seeds, known, files, lambda *found: np.interp(target, *_rising(*found)))


def _reached(seeds: Sequence[Ladder], target: float) -> bool:
    low, high = _range(seeds)
    return low - 1e-6 <= target <= high + 1e-6  # compute is a sum of floats


def _rising(compute: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = compute.argsort(kind="stable")
    return compute[order], loss[order]


def _interpolated(
    seeds: Sequence[Ladder],
    values: Sequence[Tensor],
    files: Tensor | None,
    statistic: Callable[..., float],
    *more: Tensor,
) -> Estimate:
    """A statistic of a frontier's compute (P,), of values (P,), and of the means of more columns (W,)."""
    steps = max(map(len, values))
    columns = torch.stack(
        [
            torch.cat([_with_steps(one.spent, steps), _with_steps(own, steps), *(column[None] for column in more)])
            for one, own in zip(seeds, values, strict=True)
        ]
    )

    def of_means(means: np.ndarray) -> float:
        return statistic(means[:steps], means[steps : 2 * steps], *means[2 * steps :])

    return estimate(columns, files, statistic=of_means)


def _with_steps(values: Tensor, count: int) -> Tensor:
    """(P, W) -> (count, W): the last step stands again, which changes no frontier; seeds can have other steps."""
    return values[torch.arange(count).clamp(max=len(values) - 1)]


def minus(own: Estimate, rival: Estimate) -> Row:
    """`difference`, `interval` and `p` of two routers on the same windows."""
    found = own - rival
    return {"difference": found.value, "interval": found.interval, "p": found.p}


def _range(seeds: Sequence[Ladder]) -> list[float]:
    """The range of compute that all seeds reach."""
    return [max(ladder.compute.min().item() for ladder in seeds), min(ladder.compute.max().item() for ladder in seeds)]


def summaries(ladders: Ladders, *, level: float, worst: Tensor, files: Tensor | None = None) -> list[Row]:
    """Rows for the whole frontier of each router.

    Args:
        ladders: by router.
        level: a loss in nats, for example that of all-big.
        worst: (W,) nats, losses of the windows whose mean is the corner of the hypervolume, at compute 1.
        files: (W,), which file a window is from.

    Returns:
        Rows with `router`, `seeds`, `hypervolume` (nats x compute), the mean of the seeds', with its
        `hypervolume_interval`, `level_at`: the smallest compute at which the frontier of the seeds' means is at or
        below the level, or None, and the `frontier`: per step `compute`, `loss` and its `interval`, means over seeds.
    """
    rows = []
    for name, seeds in ladders.items():
        area = _interpolated(seeds, [one.losses for one in seeds], files, _area, worst)
        row = {"router": name, "seeds": len(seeds), "hypervolume": area.value, "hypervolume_interval": area.interval}
        rows.append({**row, "level_at": reaches(*_mean(seeds), level), "frontier": _steps(seeds, files)})
    return rows


def _area(compute: np.ndarray, loss: np.ndarray, worst: float) -> float:
    return hypervolume(compute, loss, worst_loss=worst)


def _mean(seeds: Sequence[Ladder]) -> tuple[Tensor, Tensor]:
    """The frontier of the seeds' means, step by step: compute (P,), loss (P,)."""
    compute = torch.stack([ladder.compute for ladder in seeds])
    return compute.mean(0), torch.stack([ladder.loss for ladder in seeds]).mean(0)


def _steps(seeds: Sequence[Ladder], files: Tensor | None) -> list[Row]:
    losses = torch.stack([ladder.losses for ladder in seeds]).unbind(1)  # (S, W) each
    found = [estimate(step, files) for step in losses]
    compute = _mean(seeds)[0].tolist()
    points = sorted(zip(compute, found, strict=True), key=lambda point: point[0])
    return [{"compute": spent, "loss": loss.value, "interval": loss.interval} for spent, loss in points]
