"""The page of a comparison of routers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from plotly.colors import qualitative
from plotly.graph_objects import Figure

from duorl.costs import ACTIONS
from duorl.evaluation import Comparison
from duorl.paper.pictures import around
from duorl.reports.charts import (
    ACTION_COLORS,
    Numbers,
    axes,
    both_colourings,
    chart,
    choice,
    column,
    document,
    error_bars,
    heat_maps,
    layer_step,
    route_maps,
)
from duorl.reports.figures import BOUNDS, HOLM, MIXED, bound_of, called, level_cell, transfer_cell, transfer_lines
from duorl.reports.tasks import tasks_table

_COLORS = 10  # of plotly, before they come again


def comparison_page(folder: Path) -> str:
    """The page of the comparison in a folder.

    Raises:
        FileNotFoundError, ValueError: comparison.json is missing, or not JSON.
    """
    comparison = Comparison.load(folder / "comparison.json")
    settings, note = comparison.settings, BOUNDS[bound_of(comparison)]
    parts = [
        "<h2>Loss against compute</h2>",
        chart(_frontier(comparison)),
        f"<p class='note'>Bars: 95 % interval of the paired difference to best fixed. {note}</p>",
        "<h2>All routers</h2>",
        _comparison_table(comparison),
    ]
    if (folder / "budgets.json").is_file():
        for text, found in json.loads((folder / "budgets.json").read_text())["texts"].items():
            parts += _budgets(text, found)
    if (folder / "tasks.json").is_file():
        parts += ["<h2>Tasks</h2>", tasks_table(json.loads((folder / "tasks.json").read_text()))]
    if (folder / "traces.json").is_file():
        parts += _traces(json.loads((folder / "traces.json").read_text()), exact=bound_of(comparison) == "exact")
    return document("Comparison of routers", settings, parts)


def _frontier(comparison: Comparison) -> Figure:
    figure = Figure()
    for kind, dash in (("fixed", "solid"), ("oracle", "dot")):
        if not (points := comparison.frontiers[kind]):
            continue
        label = f"{kind} per number of big layers ({points[0]['context']})"
        hover = [f"{point['big']} big" for point in points]
        line = {"dash": dash, "color": "#999"}
        figure.add_scatter(x=column(points, "compute"), y=column(points, "loss"), name=label, text=hover, line=line)
    for place, row in enumerate(comparison.rows):
        low, high = around(row, "loss", "loss_minus_fixed")
        figure.add_scatter(
            x=[row["compute"]],
            y=[row["loss"]],
            error_y=error_bars([row["loss"]], [low], [high]),
            name=called(row["router"]),
            mode="markers",
            marker={"size": 10, "symbol": "circle" if place < _COLORS else "diamond"},
            visible=True if row["loss"] < comparison.frontiers["fixed"][0]["loss"] + 0.5 else "legendonly",
        )
    return axes(figure, "compute (FFN FLOPs / all-big)", "loss (nats per token)")


_COLUMNS = {
    "loss": "loss",
    "perplexity": "perplexity",
    "compute": "compute",
    "flops_per_token": "FLOPs per token",
    "top1_agreement": "top-1 agreement with all-big",
    "return": "return",
    "return_minus_fixed": "return minus best fixed",
    "loss_minus_fixed": "loss minus best fixed",
    "loss_minus_mix": "loss minus fixed mix at equal compute",
    "regret": "regret",
    "agreement": "agreement with the bound",
    "tokens_per_second": "tokens / s",
}


def _comparison_table(comparison: Comparison) -> str:
    rows = []
    for row in comparison.rows:
        cells = "".join(
            _cell(row.get(key), row.get(f"{key}_interval"), key, holds=row.get(f"{key}_holds", False))
            for key in _COLUMNS  # older files have fewer
        )
        rows.append(f"<tr><td>{escape(called(row['router']))}{'*' if row['sees_label'] else ''}</td>{cells}</tr>")
    head = "".join(f"<th>{title}</th>" for title in ("router", *_COLUMNS.values()))
    note = (
        "Routed context; regret and agreement with the bound in the reference context. Fixed mix: the best mixture of "
        "two fixed patterns at the compute of the row. Top-1 agreement: share of "
        "the tokens whose most likely next token is all-big's. Below each number its 95 % interval. "
        f"{HOLM} * sees the label: a bound, not a rival. {BOUNDS[bound_of(comparison)]}"
    )
    body = f"<table id='routers'><tr>{head}</tr>{''.join(rows)}</table>"
    notes = "".join(f"<p class='note'>{escape(line)}.</p>" for line in transfer_lines(comparison))
    return f"<div class='wide'>{body}</div><p class='note'>{note}</p>{notes}"


def _cell(
    value: float | None, interval: Sequence[float] | None, key: str, digits: int = 3, *, holds: bool = False
) -> str:
    if value is None:
        return "<td></td>"
    ends = " to ".join(_short(end, digits) for end in interval or ())
    shown = f"{_short(value, digits)}{'^' if holds else ''}<br><span class='interval'>{ends}</span>"
    return f"<td data-key='{key}' data-value='{value!r}'>{shown}</td>"


def _short(value: float, digits: int = 3) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}f}"


def _budgets(text: str, found: Numbers) -> list[str]:
    """Routers at equal compute: frontiers, losses at the targets, and differences to each rival."""
    figure = Figure()
    for place, router in enumerate(found["routers"]):
        steps = router["frontier"]
        ends = [step["interval"] or [step["loss"]] * 2 for step in steps]
        below = [step["loss"] - low for step, (low, _) in zip(steps, ends, strict=True)]
        above = [high - step["loss"] for step, (_, high) in zip(steps, ends, strict=True)]
        bars = {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "thickness": 0.5}
        shared = {"legendgroup": router["router"], "marker": {"color": qualitative.Plotly[place % _COLORS]}}
        xs, ys = column(steps, "compute"), column(steps, "loss")
        figure.add_scatter(x=xs, y=ys, error_y=bars, name=router["router"], mode="markers", **shared)
        mixed = dict(zip("xy", zip(*router["mixed"], strict=True), strict=True))
        figure.add_scatter(**mixed, mode="lines", showlegend=False, hoverinfo="skip", **shared)
    note = (
        "Points: measured steps, means over seeds; lines: what mixtures of them reach. Bars and intervals: 95 %, over "
    )
    note += "seeds and files. Differences are paired by window. "
    note += f"{HOLM.replace('the table', 'a column')} {MIXED}"
    levels = "; ".join(f"{router['router']} {level_cell(router)}" for router in found["routers"])
    return [
        f"<h2>At equal compute: {escape(text)}</h2>",
        chart(axes(figure, "compute (FFN FLOPs / all-big)", "loss (nats per token)")),
        _budget_table(found["rows"]),
        f"<p class='note'>{note}</p>",
        f"<p class='note'>All-big's loss is reached at: {escape(levels)} of the compute of the networks.</p>",
        _transfer(found.get("transfer")),
    ]


def _transfer(found: Numbers | None) -> str:
    """Loss and compute on a text that routers did not learn on, without and with a calibration there."""
    if not found or found["learned"]:
        return ""
    rows = "".join(
        f"<tr><td>{escape(row['router'])}</td><td>{row['target']:g}</td><td>{transfer_cell(row)}</td></tr>"
        for row in found["rows"]
    )
    head = "<tr><th>router</th><th>for compute</th><th>loss at compute</th></tr>"
    note = "No router learned on this text. As learned: calibrated to the compute on the text that it learned on."
    return f"<table class='transfer'>{head}{rows}</table><p class='note'>{note}</p>"


def _budget_table(rows: Sequence[Numbers]) -> str:
    names = list(dict.fromkeys(row["router"] for row in rows))
    more = {key: _COLUMNS[key] for key in ("top1_agreement", "flops_per_token", "tokens_per_second")}
    titles = ("router", "compute", "loss", *(f"minus {name}" for name in names), *more.values())
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    lines = []
    for row in rows:
        cells = [f"<td>{escape(row['router'])}</td><td>{row['target']:g}</td>"]
        cells.append(_cell(row["loss"], row["loss_interval"], "loss", 4))
        for name in names:
            against = row["minus"].get(name) or {"difference": None, "interval": None}
            holds = against.get("holds", False)
            cells.append(_cell(against["difference"], against["interval"], name, 4, holds=holds))
        if row["loss"] is not None:
            cells += [_cell(row.get(key), row.get(f"{key}_interval"), key) for key in more]  # older files have none
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<div class='wide'><table class='budgets'><tr>{head}</tr>{''.join(lines)}</table></div>"


def _traces(traces: Numbers, *, exact: bool) -> list[str]:
    routers = {called(name): found for name, found in traces["routers"].items()}
    maps = {name: found["share_of_big"] for name, found in routers.items()}
    routes = {name: found["routes"] for name, found in routers.items()}
    difficulty = (
        ["<h2>Token difficulty</h2>", both_colourings(traces["difficulty"], exact=exact)]
        if traces["difficulty"]
        else []
    )
    return [
        "<h2>Action shares per layer</h2>",
        chart(_shares({name: found["per_layer"] for name, found in routers.items()})),
        "<h2>Share of big by layer and position</h2>",
        chart(heat_maps(maps, "position in the window")),
        "<h2>Routes of one sequence</h2>",
        chart(route_maps(routes, traces["tokens"])),
        *difficulty,
    ]


def _shares(routers: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    figure = Figure()
    for place, per_layer in enumerate(routers.values()):
        for action, shares in per_layer.items():
            figure.add_bar(y=shares, name=action, marker_color=ACTION_COLORS[action], visible=place == 0)
    choice(figure, list(routers), len(ACTIONS))
    layers = max((len(shares) for per_layer in routers.values() for shares in per_layer.values()), default=0)
    figure.update_layout(barmode="stack")
    return axes(figure, "layer", "share of the tokens").update_xaxes(dtick=layer_step(layers))
