"""Routers at equal compute: their frontiers over a ladder of prices, with seeds, windows and paired tests.

A router that was trained for a range of prices is measured at several of them, a fixed pattern with every
number of big layers: its `Ladder`. Between two steps a deployment may mix them, so at a given compute the loss
of every window is interpolated linearly. All routers of a table spend exactly the same then, and are compared
window by window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from duorl.evaluation.measure import measure
from duorl.evaluation.statistics import bootstrap_interval, hypervolume, interpolate, reaches, sign_flip_test
from duorl.models.modeling import DuoForCausalLM
from duorl.routers import Router

Row = dict[str, Any]


@dataclass(frozen=True)
class Ladder:
    """One router at several budgets, in the routed context.

    Attributes:
        compute: (P,), mean compute at each step, in [0, 1].
        losses: (P, W), nats per token, the mean of each window.
    """

    compute: Tensor
    losses: Tensor

    @classmethod
    def climb(cls, model: DuoForCausalLM, steps: Sequence[Router], windows: Tensor) -> Ladder:
        """Measure routers, one per step, on windows (W, T+1)."""
        measured = [measure(model, router, windows) for router in steps]
        return cls(torch.stack([m.compute.mean() for m in measured]), torch.stack([m.loss.mean(1) for m in measured]))

    @property
    def loss(self) -> Tensor:
        """(P,) nats, means over windows."""
        return self.losses.mean(1)

    def at(self, compute: float) -> Tensor | None:
        """(W,) nats, the windows' losses at a compute; None where the ladder does not reach it."""
        return interpolate(self.compute, self.losses, compute)

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        save_file({"compute": self.compute, "losses": self.losses}, path)

    @classmethod
    def load(cls, path: Path) -> Ladder:
        """A saved ladder."""
        return cls(**load_file(path))


Ladders = Mapping[str, Sequence[Ladder]]
"""By router, one ladder per training seed."""


def budget_rows(ladders: Ladders, targets: Sequence[float], *, resamples: int) -> list[Row]:
    """A row per target compute and router.

    Returns:
        Rows with `router`, `seeds`, `target`, `compute` (the target: all are interpolated to it), `loss` in nats with
        its 95 % `loss_interval` over seeds and windows, and `minus`: by rival the paired `difference` of losses (below
        0 is better than the rival), its `interval`, and `p` of a sign-flip test over windows. A router that cannot
        spend the target has None for all of these, and `spends` says what it can: least and most.
    """
    return [row for target in targets for row in _rows_at(ladders, target, resamples)]


def _rows_at(ladders: Ladders, target: float, resamples: int) -> list[Row]:
    reached = {name: _stacked([ladder.at(target) for ladder in seeds]) for name, seeds in ladders.items()}
    return [
        {
            "router": name,
            "seeds": len(ladders[name]),
            "target": target,
            "spends": _range(ladders[name]),
            **_loss(losses, target, resamples),
            "minus": _differences(name, reached, resamples),
        }
        for name, losses in reached.items()
    ]


def _stacked(parts: Sequence[Tensor | None]) -> Tensor | None:
    """(S, W), or None unless every seed reaches the target."""
    found = [part for part in parts if part is not None]
    return torch.stack(found) if len(found) == len(parts) else None


def _range(seeds: Sequence[Ladder]) -> list[float]:
    """What all seeds can spend."""
    return [max(ladder.compute.min().item() for ladder in seeds), min(ladder.compute.max().item() for ladder in seeds)]


def _loss(losses: Tensor | None, target: float, resamples: int) -> Row:
    if losses is None:
        return {"compute": None, "loss": None, "loss_interval": None}
    interval = bootstrap_interval(losses, resamples=resamples)
    return {"compute": target, "loss": losses.mean().item(), "loss_interval": interval}


def _differences(name: str, reached: Mapping[str, Tensor | None], resamples: int) -> dict[str, Row]:
    own, found = reached[name], {}
    for rival, losses in reached.items():
        if rival != name and own is not None and losses is not None:
            found[rival] = difference(own, losses, resamples=resamples)
    return found


def difference(own: Tensor, rival: Tensor, *, resamples: int) -> Row:
    """Two routers on the same windows.

    Args:
        own: (S, W) nats.
        rival: (S', W); S' = S or 1, or S = 1; otherwise the rival's seeds are averaged.
        resamples: of the bootstrap.

    Returns:
        `difference`, `interval`, `p`.
    """
    paired = own - (rival if 1 in (len(own), len(rival)) or len(own) == len(rival) else rival.mean(0))
    return {
        "difference": paired.mean().item(),
        "interval": bootstrap_interval(paired, resamples=resamples),
        "p": sign_flip_test(paired),
    }


def summaries(ladders: Ladders, *, level: float, worst_loss: float, resamples: int) -> list[Row]:
    """A row per router for its whole frontier.

    Args:
        ladders: by router.
        level: a loss in nats, all-big's, for instance.
        worst_loss: corner of the hypervolume, at compute 1.
        resamples: of the bootstrap.

    Returns:
        Rows with `router`, `seeds`, `hypervolume` (nats x compute) with `hypervolume_interval` over seeds and
        windows, `level_at`: the least compute at which the frontier of the seeds' means is at the level or below, or
        None, and the `frontier`: per step `compute`, `loss` and its `interval`, means over seeds.
    """
    return [
        {
            "router": name,
            "seeds": len(seeds),
            **_hypervolume(seeds, worst_loss, resamples),
            "level_at": reaches(*_mean(seeds), level),
            "frontier": _steps(seeds, resamples),
        }
        for name, seeds in ladders.items()
    ]


def _mean(seeds: Sequence[Ladder]) -> tuple[Tensor, Tensor]:
    """The frontier of the seeds' means, step by step: compute (P,), loss (P,)."""
    compute = torch.stack([ladder.compute for ladder in seeds])
    return compute.mean(0), torch.stack([ladder.loss for ladder in seeds]).mean(0)


def _hypervolume(seeds: Sequence[Ladder], worst_loss: float, resamples: int) -> Row:
    volumes = [hypervolume(ladder.compute, ladder.loss, worst_loss=worst_loss) for ladder in seeds]
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for _ in range(resamples // 10):  # an area costs more than a mean
        ladder = seeds[int(torch.randint(len(seeds), (), generator=generator))]
        windows = torch.randint(ladder.losses.shape[1], (ladder.losses.shape[1],), generator=generator)
        resampled = ladder.losses[:, windows].mean(1)
        drawn.append(hypervolume(ladder.compute, resampled, worst_loss=worst_loss))
    low, high = torch.tensor(drawn).quantile(torch.tensor([0.025, 0.975])).tolist()
    return {"hypervolume": sum(volumes) / len(volumes), "hypervolume_interval": [low, high]}


def _steps(seeds: Sequence[Ladder], resamples: int) -> list[Row]:
    losses = torch.stack([ladder.losses for ladder in seeds])  # (S, P, W)
    compute, loss = _mean(seeds)
    return [
        {
            "compute": compute[step].item(),
            "loss": loss[step].item(),
            "interval": bootstrap_interval(losses[:, step], resamples=resamples),
        }
        for step in range(len(compute))
    ]
