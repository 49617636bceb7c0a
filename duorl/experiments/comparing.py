"""The comparison at the end of a run: compute it and write it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from torch import Tensor

from duorl.costs import ACTIONS
from duorl.evaluation.baseline import Baseline
from duorl.evaluation.choice import choose, flops_per_second
from duorl.evaluation.compare import Comparer, Comparison
from duorl.experiments.voice import say, show, status
from duorl.files import write_json, write_text, writing
from duorl.models import DuoForCausalLM
from duorl.models.footprint import Batch, require_room
from duorl.reports import page
from duorl.reports.figures import frontier, markdown, table
from duorl.routers import ConstantRouter, RandomRouter, Router, describe, spent

MIX = "fixed mix"
"""Name of the row of a mixture of fixed patterns."""
RESULTS = ("report.html", "comparison.json", "comparison.csv", "figures/")
"""What `write` writes into a run's folder."""
_FACTS = {"text": "corpus", "layer decisions": "total_decisions", "price": "price", "command": "command"}
_MEASURED = ("router", "seeds", "tokens", "loss", "compute", "return")
_BESIDE = ("best fixed", MIX, "all-small", "all-big")


def make_comparer(
    options: Namespace,
    model: DuoForCausalLM,
    training: Tensor,
    held_out: Tensor,
    price: float,
    *,
    files: Tensor,
    ranked: dict[str, Any] | None = None,
) -> Comparer:
    """Make the comparer for a run's options; it prints first what it will search, if nothing is ranked.

    Args:
        options: with `actions`, `reference` and `evaluation`.
        model: a frozen duo model.
        training: (W, T+1) of the router split.
        held_out: (W, T+1) of the evaluation split.
        price: nats per all-big pass.
        files: (W,), which file each of these is from.
        ranked: state of the baseline, if its patterns are ranked already.
    """
    given: dict[str, Any] = {"actions": options.actions, "options": options.evaluation}
    choice = choose(model, training, held_out, **given)
    if not ranked:
        say(choice.text(flops_per_second(model, training)))
    baseline = Baseline.from_state(ranked, model, training, choice.options) if ranked else None
    with status("search the bound" if ranked else "search the best fixed pattern and the bound"):
        given |= {"price": price, "reference": options.reference, "files": files, "baseline": baseline}
        return Comparer(model, training, held_out, **given)


def fixed_mix(comparer: Comparer, router: Router, text: Tensor) -> dict[str, list[Router]]:
    """The row of the best mixture of fixed patterns that spends what a router spends on router text (W, T+1).

    A draw between two patterns is the simplest rival at the same cost. Empty where no two patterns spend so much.
    """
    try:
        return {MIX: [comparer.baseline.mixed(spent(comparer.model, router, text))]}
    except ValueError:
        return {}


def check_evaluation(options: Namespace, model: DuoForCausalLM, training: Tensor, held_out: Tensor) -> None:
    """Check before a training that the evaluation after it is possible.

    Raises:
        ValueError: a search that was asked for by name is impossible, or the windows of a pass do not fit into memory;
            the message says which and why.
    """
    sizes = options.evaluation.sized(model.num_layers)
    length = held_out.shape[1] - 1
    at_once = min(sizes.batch, max(sizes.windows, sizes.final_windows))
    require_room(model, Batch(at_once, length), f"lower evaluation.batch ({sizes.batch})")
    choice = choose(model, training, held_out, actions=options.actions, options=options.evaluation)
    if choice.bound != "none":
        searched = choice.options.reference_windows
        fix = f"lower evaluation.reference_windows ({searched})"
        require_room(model, Batch(searched, length, context="reference"), fix)


def compare(comparer: Comparer, routers: Mapping[str, list[Router]], settings: dict[str, Any]) -> Comparison:
    """Compare all routers, the bound last; a line on the terminal names the router that is being measured."""
    with status("") as update:
        return comparer.compare({**routers, **comparer.bounds}, settings, update)


def unlearned(actions: list[str], seed: int) -> dict[str, list[Router]]:
    """The routers that learn nothing, by their names in tables."""
    constant: dict[str, list[Router]] = {f"all-{action}": [ConstantRouter(action)] for action in ACTIONS}
    return {"random": [RandomRouter(actions, seed)], **constant}


def write(comparison: Comparison, traces: dict[str, Any], folder: Path) -> None:
    """Print a comparison's table and write its numbers, its figure and its report."""
    show(table(comparison))
    comparison.save(folder)
    write_text(folder / "comparison.md", markdown(comparison))
    with writing(folder / "figures" / "frontier.png") as beside:
        frontier(comparison).savefig(beside, dpi=150)
    write_json(folder / "traces.json", traces)
    page.write(folder)


def write_cards(comparison: Comparison, places: Iterable[tuple[str, str | Path]]) -> None:
    """Give learned routers their cards: how each was trained, and what the comparison measured.

    Args:
        comparison: the comparison, of a run of `duorl train` or `duorl compare`.
        places: names of learners in it, and folders of their routers.
    """
    settings, rows = comparison.settings, {row["router"]: row for row in comparison.rows}
    facts = {name: settings[key] for name, key in _FACTS.items()}
    for name, place in places:
        shown = [rows[other] for other in (name, *_BESIDE) if other in rows]
        measured = [{key: row[key] for key in _MEASURED} for row in shown]
        describe(place, {"name": name, **facts, "measured on held-out text": measured})
