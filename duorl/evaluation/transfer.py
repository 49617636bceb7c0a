"""Transfer: what a router loses and spends on text of another kind than it learned on.

`learned_on` compares one router's compute on two texts. `transfer_rows` does so at target computes, from ladders: a
router that is calibrated on the text that it learned on spends another compute on a new text (drift). Calibrated anew,
on router text of the new kind and without labels, it spends what it shall.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from duorl.corpus import Windows
from duorl.evaluation.frontier import Ladder, Ladders, shares_at
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
        new: ladders by router on held-out text of the new kind, with those on its router split (`chosen`).
        learned: the same for each text that the routers learned on.
        targets: values of the compute.
        files: (W,), file of each window of the new text.

    Returns:
        Rows with `router`, `target`, and `as_learned` and `calibrated`: `compute` and `loss` on the new text with
        their `NAME_interval`, of the mixture that spends the target on router text of the old kind, or of the new, and
        is best there. None where it does not reach the target. (`compute` minus `target` is the drift.)
    """
    home = {name: [_at_home(learned, name, seed) for seed in range(len(seeds))] for name, seeds in new.items()}
    here = {name: [_router_text(ladder) for ladder in seeds] for name, seeds in new.items()}
    return [
        {
            "router": name,
            "target": target,
            "as_learned": _mixed(seeds, home[name], target, files),
            "calibrated": _mixed(seeds, here[name], target, files),
        }
        for target in targets
        for name, seeds in new.items()
    ]


def _router_text(ladder: Ladder) -> Tensor:
    """Mean compute and loss of each step on router text, (2, P)."""
    if ladder.chosen is None:
        raise ValueError("a ladder lacks the measurements on router text: measure it with `router_text`")
    return torch.stack([ladder.chosen.compute, ladder.chosen.loss])


def _at_home(learned: Sequence[Ladders], name: str, seed: int) -> Tensor:
    """The same on the texts that the router learned on: the mean over texts."""
    return torch.stack([_router_text(text[name][seed]) for text in learned]).mean(0)


def _mixed(seeds: Sequence[Ladder], texts: Sequence[Tensor], target: float, files: Tensor) -> Row | None:
    """Compute and loss of the mixtures that spend the target on the given router texts, (2, P) each."""
    spent, losses = [], []
    for known, ladder in zip(texts, seeds, strict=True):
        compute, loss = known.double().numpy()
        shares = shares_at(compute, loss, target)
        if shares is None:
            return None
        weights = torch.from_numpy(shares).to(ladder.losses)
        spent.append(weights @ ladder.spent)
        losses.append(weights @ ladder.losses)
    found = [estimate(torch.stack(values), files) for values in (spent, losses)]
    return {**named("compute", found[0], as_share), **named("loss", found[1])}
