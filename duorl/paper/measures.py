"""Measures of routes and losses, and Figure 8 from the rows of dense models: pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from duorl.costs import SKIP
from duorl.oracle import RouteTable

Numbers = dict[str, Any]


def scaling(rows: Sequence[Numbers], texts: Mapping[str, str]) -> dict[str, Numbers]:
    """Figures 8 a to c from the rows of `duorl.paper.dense`.

    Args:
        rows: see `duorl.paper.dense.measure_all`.
        texts: texts of the rows, by their names in the figures; the first is 8a's, the second 8b's. A text without rows
            is left out.
    """

    def points(text: str, model: str) -> list[Numbers]:
        return [row for row in rows if row["text"] == text and row["model"].startswith(model)]

    figures = {}
    texts = {name: text for name, text in texts.items() if points(text, "duo")}
    if not texts:
        return {}
    for letter, (name, text) in zip("ab", texts.items(), strict=False):
        models = {"duo, random routing": points(text, "duo"), "dense": points(text, "dense")}
        figures[f"8{letter}"] = {"texts": {name: models}}
    both = {"both from scratch": "duo", "small beside frozen big": "frozen"}
    figures["8c"] = {
        "texts": {name: {label: points(text, m) for label, m in both.items()} for name, text in texts.items()}
    }
    return figures


STUDIED = (*(f"{number}{letter}" for number in "23" for letter in "abcd"), "4a", "4b", "4c", "5", "6", "7")
"""The figures that a study measures; the 8th is in `duorl.paper.dense`."""


LOWER_BOUND = "lower bound of the oracle's return"
"""The name of a search that takes the oracle's place, in every table and figure."""


def name_of(kind: str, numbers: Numbers) -> str:
    """The name of a curve in a figure; the oracle's is another one where a search takes its place."""
    return LOWER_BOUND if kind == "oracle" and numbers.get("bound") == "lower bound" else kind


def on_cpu(table: RouteTable) -> RouteTable:
    """The same table on the CPU."""
    tensors: dict[str, Any] = {name: value.cpu() for name, value in vars(table).items() if isinstance(value, Tensor)}
    return replace(table, **tensors)


def lateness(chosen: Tensor) -> Tensor:
    """Mean layer of the big decisions minus the middle layer; positive is late: chosen (W, T, L) to (W,)."""
    layer = torch.arange(chosen.shape[2]) - (chosen.shape[2] - 1) / 2
    return (chosen * layer).sum((1, 2)) / chosen.sum((1, 2)).clamp(min=1)


def quarters(chosen: Tensor) -> Tensor:
    """Share of big in the first quarter of the positions minus that in the last: chosen (W, T, L) to (W,)."""
    quarter = max(1, chosen.shape[1] // 4)
    return chosen[:, :quarter].mean((1, 2)) - chosen[:, -quarter:].mean((1, 2))


def early_exits(routes: Tensor) -> Tensor:
    """Which routes are early exits: after the first skip, all layers skip. Routes (..., L) to (...) bool."""
    skipped = (routes == SKIP).long()
    return (skipped.diff(dim=-1) >= 0).all(-1)


def rank_correlation(x: Tensor, y: Tensor) -> Tensor:
    """Spearman's correlation in each window; equal values have the mean of their ranks: (W, T) to (W,)."""
    from scipy.stats import rankdata

    ranks = [torch.from_numpy(rankdata(values.cpu().numpy(), axis=1)) for values in (x, y)]
    centred = [rank - rank.mean(1, keepdim=True) for rank in ranks]
    return ((centred[0] * centred[1]).sum(1) / (centred[0].norm(dim=1) * centred[1].norm(dim=1))).float()


def top_overlap(x: Tensor, y: Tensor) -> Tensor:
    """Of the tenth of tokens with the largest x, the share that is in the tenth with the largest y, (W, T) to (W,)."""
    count = max(1, x.shape[1] // 10)
    tops = [torch.zeros_like(values).scatter(1, values.topk(count).indices, 1.0) for values in (x, y)]
    return (tops[0] * tops[1]).sum(1) / count
