"""Routers at equal compute: rows of tables from the frontiers of their ladders, with paired tests.

All routers of a table spend exactly the same compute, each by the mixture of its steps that is best on router text
(`duorl.evaluation.frontier`), and are compared on the same windows.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from duorl.evaluation.frontier import Frontier, Ladder, Ladders
from duorl.evaluation.statistics import Estimate, as_share, holm, named
from duorl.files import writing

Row = dict[str, Any]


def budget_rows(
    ladders: Ladders, targets: Sequence[float], files: Tensor | None = None, chosen_files: Tensor | None = None
) -> list[Row]:
    """Rows for each target compute and router.

    Args:
        ladders: ladders by router.
        targets: values of the compute.
        files: (W,), file of each window.
        chosen_files: (W',), file of each window of the router text that decides which steps are mixed.

    Returns:
        Rows with `router`, `seeds`, `target`, `compute` (the target, or less where less is best), `loss` in nats,
        `top1_agreement` and `tokens_per_second`, each with its `NAME_interval`, `router_flops` per token of the
        router's own decisions, and `minus`: by rival the paired `difference` of losses (below 0 is better than the
        rival), its `interval`, its two-sided `p`, and whether it `holds` by Holm's procedure over all routers and
        targets that are compared with this rival. If a router does not reach the target, all of these are None, and
        `spends` is the range of its compute. See `duorl.evaluation.statistics` for intervals and tests.
    """
    frontiers = {name: Frontier(seeds, files, chosen_files) for name, seeds in ladders.items()}
    rows = [row for target in targets for row in _rows_at(frontiers, target)]
    for rival in ladders:
        family = [row["minus"][rival] for row in rows if rival in row["minus"]]
        for difference, holds in zip(family, holm([one["p"] for one in family]), strict=True):
            difference["holds"] = holds
    return rows


def _rows_at(frontiers: dict[str, Frontier], target: float) -> list[Row]:
    reached = {name: frontier.at(target) for name, frontier in frontiers.items()}
    return [_row(name, frontiers[name], target, reached) for name in frontiers]


def _row(name: str, frontier: Frontier, target: float, reached: dict[str, Estimate | None]) -> Row:
    own, spent, flops = (frontier.at(target, of) for of in (None, "spent", "own_flops"))
    return {
        "router": name,
        "seeds": len(frontier.seeds),
        "target": target,
        "spends": list(frontier.range),
        "compute": spent and spent.value,
        **named("loss", own),
        **named("top1_agreement", frontier.at(target, "top1_agreement"), as_share),
        **named("tokens_per_second", _speed(frontier, target), math.exp),
        "router_flops": flops and flops.value,
        "minus": {
            rival: minus(own, other)
            for rival, other in reached.items()
            if rival != name and own is not None and other is not None
        },
    }


def _speed(frontier: Frontier, target: float) -> Estimate | None:
    """Logarithm of the tokens per second at a compute; its interval is over seeds and batches."""
    return frontier.at(target, "seconds", scale=lambda seconds: -math.log(seconds))


def minus(own: Estimate, rival: Estimate) -> Row:
    """`difference`, `interval` and `p` of two routers on the same windows."""
    found = own - rival
    return {"difference": found.value, "interval": found.interval, "p": found.p}


def summaries(
    ladders: Ladders,
    *,
    level: Tensor | float,
    worst: Tensor,
    files: Tensor | None = None,
    chosen_files: Tensor | None = None,
) -> list[Row]:
    """Rows for the whole frontier of each router.

    Args:
        ladders: by router.
        level: (W,) nats, losses of the windows whose mean is a level, for example those of all-big; or that mean.
        worst: (W,) nats, losses of the windows whose mean is the corner of the hypervolume, at compute 1.
        files: (W,), which file a window is from.
        chosen_files: (W',), which file a window of the router text is from.

    Returns:
        Rows with `router`, `seeds`, `hypervolume` (nats x compute), the mean of the seeds', with its
        `hypervolume_interval`; `level_at`, the smallest compute at which the frontier is at or below the level, or
        None, with its `level_at_interval`, see `Reach`; the `frontier`: per step of the ladders `compute`, `loss` and
        its `interval`, means over seeds; and `mixed`, pairs of compute and loss along what mixtures reach.
    """
    levels = torch.full_like(worst, level) if isinstance(level, float) else level
    rows = []
    for name, seeds in ladders.items():
        frontier = Frontier(seeds, files, chosen_files)
        reach = frontier.reaches(levels)
        rows.append(
            {
                "router": name,
                "seeds": len(seeds),
                **named("hypervolume", frontier.area(worst)),
                "level_at": reach.compute,
                "level_at_interval": reach.interval,
                "frontier": [
                    {"compute": spent, "loss": loss.value, "interval": loss.interval}
                    for spent, loss in frontier.steps()
                ],
                "mixed": frontier.line(),
            }
        )
    return rows


@dataclass(frozen=True)
class MeasuredText:
    """All routers of a run, measured on one text: whatever its tables say follows from this.

    Attributes:
        ladders: by router, one per training seed.
        files, chosen_files: (W,) and (W',), files of the measured windows and of those that decide what is mixed.
        small, big: (W,) nats, losses of all-small and all-big.
        flops: (2,), FLOPs per token without any feed-forward network, and of all big ones.
        length: tokens per window, T.
    """

    ladders: Ladders
    files: Tensor
    chosen_files: Tensor
    small: Tensor
    big: Tensor
    flops: Tensor
    length: int

    def numbers(self, targets: Sequence[float]) -> Row:
        """A text of `budgets.json`; rows also have `flops_per_token`, with the router's own, and `flops_share`.

        The share is that of an all-big pass.
        """
        files = {"files": self.files, "chosen_files": self.chosen_files}
        rows, (fixed, networks) = budget_rows(self.ladders, targets, **files), self.flops.tolist()
        for row in rows:
            known = row["compute"] is not None
            spent = fixed + networks * row["compute"] + (row["router_flops"] or 0.0) if known else None
            row |= {"flops_per_token": spent, "flops_share": spent and spent / (fixed + networks)}
        return {
            "tokens": len(self.files) * self.length,
            "all_big": self.big.mean().item(),
            "rows": rows,
            "routers": summaries(self.ladders, level=self.big, worst=self.small, **files),
        }


def save_texts(texts: Mapping[str, MeasuredText], path: Path) -> None:
    """Write one compressed safetensors file; the numbers in its names keep texts and routers in order."""
    tensors: dict[str, Tensor] = {}
    for place, (text, found) in enumerate(texts.items()):
        more = {each.name: getattr(found, each.name) for each in fields(found) if each.name != "ladders"}
        tensors |= {f"{place:03} {text}|{name}": torch.as_tensor(values).clone() for name, values in more.items()}
        for number, (router, seeds) in enumerate(found.ladders.items()):
            for seed, ladder in enumerate(seeds):
                own = f"{place:03} {text}|{number:03} {router}|{seed:03}"
                tensors |= {f"{own}|{name}": values.clone() for name, values in ladder.tensors().items()}
    with writing(path) as beside:
        beside.write_bytes(gzip.compress(save(tensors), mtime=0))


def load_texts(path: Path) -> dict[str, MeasuredText]:
    """What `save_texts` has written, by text."""
    more: dict[str, dict[str, Any]] = {}
    ladders: dict[str, dict[str, dict[str, dict[str, Tensor]]]] = {}
    for key, values in sorted(load(gzip.decompress(path.read_bytes())).items()):
        text, name, *rest = key.split("|")
        text = text[4:]
        if rest:
            seeds = ladders.setdefault(text, {}).setdefault(name[4:], {})
            seeds.setdefault(rest[0], {})[rest[1]] = values
        else:
            more.setdefault(text, {})[name] = values
    return {
        text: MeasuredText(
            {router: [Ladder.of(ladder) for ladder in seeds.values()] for router, seeds in ladders[text].items()},
            **{**found, "length": int(found["length"])},
        )
        for text, found in more.items()
    }
