"""Transfer: what a router loses and spends on text of another kind than it learned on.

`learned_on` compares one router's compute on two texts. `transfer_rows` does so at target computes, from ladders: a
router that is calibrated on the text that it learned on spends another compute on a new text (drift). Calibrated anew,
on router text of the new kind and without labels, it spends what it shall.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from duorl.corpus import Windows
from duorl.evaluation.budgets import Ladder, Ladders
from duorl.evaluation.measure import measure
from duorl.evaluation.statistics import as_share, drift, estimate, named
from duorl.models.modeling import DuoForCausalLM
from duorl.routers import Router

Row = dict[str, Any]


def learned_on(model: DuoForCausalLM, router: Router, new: Windows, learned: Windows) -> Row:
    """A router on held-out text of the kind that it learned on, and the drift of its compute to a new text.

    Returns:
        `tokens`, `loss` in nats and `compute` on the text that it learned on, and `drift`: compute on the new text
        minus this compute; each with its `NAME_interval`.
    """
    here, there = measure(model, router, new.tokens), measure(model, router, learned.tokens)
    spent = estimate(there.compute.mean(1), learned.files)
    return {
        "tokens": there.loss.numel(),
        **named("loss", estimate(there.loss.mean(1), learned.files)),
        **named("compute", spent, as_share),
        **drift(estimate(here.compute.mean(1), new.files), spent),
    }


def transfer_rows(new: Ladders, learned: Sequence[Ladders], targets: Sequence[float], files: Tensor) -> list[Row]:
    """Rows for each target compute and router on a new text.

    Args:
        new: ladders by router on held-out text of the new kind, with `calibration`, their compute on its router split.
        learned: the same for each text that the routers learned on.
        targets: values of the compute.
        files: (W,), file of each window of the new text.

    Returns:
        Rows with `router`, `target`, and `as_learned` and `calibrated`: `compute` and `loss` on the new text with
        their `NAME_interval`, of the router that spends the target on router text of the old kind, or of the new.
        None where it does not reach the target. (`compute` minus `target` is the drift.)
    """
    at_home = lambda name, seed: torch.stack([text[name][seed].calibrated for text in learned]).mean(0)  # noqa: E731
    home = {name: [at_home(name, seed) for seed in range(len(seeds))] for name, seeds in new.items()}
    return [
        {
            "router": name,
            "target": target,
            "as_learned": _mixed(seeds, home[name], target, files),
            "calibrated": _mixed(seeds, [one.calibrated for one in seeds], target, files),
        }
        for target in targets
        for name, seeds in new.items()
    ]


def _mixed(seeds: Sequence[Ladder], calibration: Sequence[Tensor], target: float, files: Tensor) -> Row | None:
    """Compute and loss of the mixture of two steps that spends the target on the text of the calibration."""
    shares = [steps_for(spent, target) for spent in calibration]
    spent, losses = [], []
    for share, ladder in zip(shares, seeds, strict=True):
        if share is None:
            return None
        spent.append(share @ ladder.spent)
        losses.append(share @ ladder.losses)
    compute, loss = (estimate(torch.stack(values), files) for values in (spent, losses))
    return {**named("compute", compute, as_share), **named("loss", loss)}


def steps_for(compute: Tensor, target: float) -> Tensor | None:
    """Shares (P,) of the steps of a ladder with a mean compute (P,) that spend a target; None if it is out of reach."""
    order = compute.argsort(stable=True)
    if not compute[order[0]] - 1e-6 <= target <= compute[order[-1]] + 1e-6:
        return None
    rising = compute[order].double().numpy()
    shares = torch.zeros(len(compute))
    for step in range(len(order)):  # the hat functions of linear interpolation
        shares[order[step]] = float(np.interp(target, rising, np.eye(len(order))[step]))
    return shares
