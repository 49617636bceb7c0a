"""The cards of models: training, text, results, and the loss curve of stage 1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from duorl import markdown
from duorl.files import write_text, writing_folder

_TEXT = """# {name}

A duo model: every layer of this {family} holds a big feed-forward network (inner size {big}) and a small one
({small}) behind one shared attention, after Duo-LLM (arXiv 2410.10846). Trained {start} under
random routing, on the `model` split of {corpus}.

    {command}

| | |
|---|---|
| layers, hidden size, vocabulary | {layers}, {hidden}, {vocabulary} |
| parameters | {parameters:,} |
| training | {steps:,} updates of {batch:,} tokens, {epochs:.1f} passes over the text |
| random routing | {skip:.0%} skip, {big_share:.0%} of the rest big, per token and layer |

Loss in nats per token on the `evaluation` split, which neither this model nor any router was trained on
(windows of {window} tokens):

{losses}
![loss during training](curve.png)

The curve follows {windows} windows of the `router` split. Its numbers are in `history.json`.
"""

_SMALL = """---
library_name: duorl
tags: [duorl]
{header}---

# {name}

Small feed-forward networks for {base}. With them, every layer has its own network, called big, and a small one behind
one shared attention, after Duo-LLM (arXiv 2410.10846), and a router of DuoRL decides for each token which of them runs.
{where}

    {command}

{facts}
Loss in nats per token on held-out text, which neither these networks nor any router was trained on:

{losses}"""

_APART = "The weights of {base} are not in this folder: `duorl.load` finds them."
_WHOLE = "The weights of {base} are in this folder too, so it needs nothing else."


def write_small_card(
    out: Path,
    *,
    facts: dict[str, Any],
    losses: dict[str, dict[str, float]],
    header: dict[str, str] | None = None,
    whole: bool = False,
) -> None:
    """Write the card of small networks, `README.md`.

    Args:
        out: their folder.
        facts: `name`; `base`, the base model; `command`, which made them; and any more, shown by their names. Lists of
            objects are shown as tables, for example the stages with their tokens and minutes.
        losses: by text, then by what was measured: `{"stdlib-docs": {"tokens": 4096, "all-big": 3.19, ...}}`.
        header: more lines for the hub, for example `license` and `base_model`.
        whole: the folder also has the weights of the base model.
    """
    rest = {name: value for name, value in facts.items() if name not in ("name", "base", "command")}
    text = _SMALL.format(
        **{name: facts[name] for name in ("name", "base", "command")},
        where=(_WHOLE if whole else _APART).format(base=facts["base"]),
        header="".join(f"{name}: {value}\n" for name, value in (header or {}).items()),
        facts=markdown.facts(rest),
        losses=markdown.table([{"text": name, **found} for name, found in losses.items()]),
    )
    write_text(out / "README.md", text)


def write_card(out: Path, *, facts: dict[str, Any], losses: dict[str, dict[str, float]]) -> None:
    """Write `README.md` and `curve.png` from `history.json` in the model's folder.

    Args:
        out: the model's folder.
        facts: values for `_TEXT`.
        losses: for each text `tokens`, `all_small` and `all_big` on its evaluation split.
    """
    rows = []
    for name, found in losses.items():
        small, big = found["all_small"], found["all_big"]
        rows.append([name, f"{found['tokens']:,}", *(f"{loss:.3f}" for loss in (small, big, small - big))])
    table = markdown.grid(("text", "tokens", "all-small", "all-big", "difference"), rows)
    with writing_folder(out, last="README.md") as beside:
        _curve(json.loads((out / "history.json").read_text())).savefig(beside / "curve.png", dpi=100)
        (beside / "README.md").write_text(_TEXT.format(**facts, losses=table), encoding="utf8")


def _curve(history: list[dict[str, float]]):
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for key, label in (
        ("loss", "random routing, training text"),
        ("eval_all_small", "all-small, held out"),
        ("eval_all_big", "all-big, held out"),
    ):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        axes.plot(*zip(*points, strict=True), label=label)
    axes.set(xlabel="update", ylabel="loss (nats per token)")
    axes.legend()
    axes.grid(alpha=0.2)
    return figure
