"""The page of a paper run: the study of Duo-LLM."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from plotly.graph_objects import Figure

from duorl.paper.claims import BOUND_NOTE, claims, is_bound
from duorl.paper.measures import STUDIED, name_of
from duorl.paper.pictures import around
from duorl.reports.charts import (
    Numbers,
    axes,
    both_colourings,
    chart,
    column,
    document,
    error_bars,
    heat_maps,
    route_maps,
)


def study_page(folder: Path) -> str:
    """The page of the study in a folder.

    Raises:
        FileNotFoundError, ValueError: a figure is missing, or not JSON.
    """
    figures = {path.stem.removeprefix("figure-"): json.loads(path.read_text()) for path in folder.glob("figure-*.json")}
    settings = json.loads((folder / "settings.json").read_text())
    if missing := [name for name in STUDIED if name not in figures]:
        raise FileNotFoundError(f"{folder} lacks figure-{missing[0]}.json")
    parts = [
        "<h2>The paper's claims</h2>",
        _claims_table(figures),
        *_notes(figures),
        "<h2>Loss against compute (4b)</h2>",
    ]
    for text, contexts in figures["4b"]["texts"].items():
        for context in ("reference", "routed"):
            parts += [f"<h3>{escape(text)}, {context} context; bars: paired difference to all-big</h3>"]
            kinds = {name_of(kind, figures["4b"]): points for kind, points in contexts[context].items()}
            parts += [chart(_curves(kinds))]
    parts += ["<h2>Share of big by layer and position (2, 3)</h2>", chart(heat_maps(_paper_maps(figures), "position"))]
    parts += ["<h2>Random patterns (4a)</h2>", chart(_histograms(figures["4a"]))]
    parts += ["<h2>Budgets along the sequence (4c)</h2>", chart(_schedules(figures["4c"]))]
    for text, found in figures["7"]["texts"].items():
        parts += [f"<h2>Routes of one sequence (7): {escape(text)}</h2>"]
        routes = {name_of(kind, figures["7"]): matrix for kind, matrix in found["routes"].items()}
        parts += [chart(route_maps(routes, found["tokens"]))]
    for text, rows in figures["6"]["texts"].items():
        parts += [f"<h2>Token difficulty (6): {escape(text)}</h2>", both_colourings(rows, exact=not is_bound(figures))]
    for name in ("8a", "8b", "8c"):
        for text, models in figures.get(name, {"texts": {}})["texts"].items():
            parts += [f"<h2>Dense models and frozen big ({name}): {escape(text)}</h2>", chart(_scaling(models))]
    return document(f"Duo-LLM on {settings['model']}", settings, parts)


def _claims_table(figures: Mapping[str, Numbers]) -> str:
    rows = "".join(
        f"<tr><td>{c.figure}</td><td class='text'>{escape(c.paper)}</td><td class='text'>{escape(c.text)}</td>"
        f"<td class='text'>{escape(c.measured)}</td><td class='{c.verdict.name}'>{c.said}</td></tr>"
        for c in claims(figures)
    )
    head = "".join(f"<th>{title}</th>" for title in ("figure", "the paper", "text", "measured here", "verdict"))
    return f"<div class='wide'><table id='claims'><tr>{head}</tr>{rows}</table></div>"


def _notes(figures: Mapping[str, Numbers]) -> list[str]:
    return [f"<p class='note'>{escape(BOUND_NOTE)}</p>"] if is_bound(figures) else []


def _curves(kinds: Mapping[str, Sequence[Numbers]]) -> Figure:
    figure = Figure()
    for kind, unsorted_points in kinds.items():
        points = sorted(unsorted_points, key=lambda point: point["compute"])
        paired = [point | {"loss_interval": around(point, "loss", "minus_all_big")} for point in points]
        _line(figure, column(points, "compute"), paired, "loss", kind, [f"{point['big']:.1f} big" for point in points])
    return axes(figure, "compute (FFN FLOPs / all-big)", "loss (nats per token)")


def _line(
    figure: Figure, xs: Sequence[float], points: Sequence[Numbers], key: str, name: str, hover: Sequence[str]
) -> None:
    low, high = zip(*(point[f"{key}_interval"] for point in points), strict=True)
    values = column(points, key)
    figure.add_scatter(x=xs, y=values, error_y=error_bars(values, low, high), name=name, text=hover)


def _paper_maps(figures: Mapping[str, Numbers]) -> dict[str, Sequence[Sequence[float]]]:
    return {
        f"{name}: {numbers['router']}, {numbers['big']} of {numbers['layers']} big, {text}": found["share_of_big"]
        for name, numbers in sorted(figures.items())
        if name[0] in "23"
        for text, found in numbers["texts"].items()
    }


def _histograms(numbers: Numbers) -> Figure:
    figure = Figure()
    for text, found in numbers["texts"].items():
        figure.add_histogram(x=found["patterns"], name=f"{text}: random patterns", opacity=0.6)
        for key in ("oracle", "best_random", "best_fixed", "soft"):
            name = f"{text}: {name_of(key, numbers).replace('_', ' ')}"
            figure.add_scatter(x=[found[key]["mean"]] * 2, y=[0, 8], mode="lines", name=name)
    return axes(figure, "loss (nats per token)", "patterns")


def _schedules(numbers: Numbers) -> Figure:
    figure = Figure()
    for text, found in numbers["texts"].items():
        values = [schedule["minus_constant"] for schedule in found.values()]
        low, high = zip(*(schedule["minus_constant_interval"] for schedule in found.values()), strict=True)
        figure.add_bar(x=list(found), y=values, name=text, error_y=error_bars(values, low, high))
    return axes(figure, "budget along the sequence", "loss minus constant (nats)")


def _scaling(models: Mapping[str, Sequence[Numbers]]) -> Figure:
    figure = Figure()
    for name, points in models.items():
        _line(figure, column(points, "big_share"), points, "accuracy", name, [point["model"] for point in points])
    return axes(figure, "share of big; dense: the same FLOPs", "accuracy of the next token")
