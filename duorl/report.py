"""The HTML report of a comparison or of a paper run: one self-contained page that needs no network.

duorl.report.write(Path("runs/compare"))     # reads the run's JSON files, writes report.html beside them
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml
from matplotlib import colormaps
from plotly.graph_objects import Figure
from plotly.offline import get_plotlyjs

from duorl.costs import ACTIONS
from duorl.evaluate import Comparison
from duorl.paper.claims import claims
from duorl.paper.pictures import around
from duorl.paper.study import STUDIED

Numbers = dict[str, Any]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.6em; } h2 { font-size: 1.2em; margin-top: 2.2em; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; font-size: 13px; } td, th { padding: 3px 9px; text-align: right; }
th { border-bottom: 1px solid #999; } td:first-child, th:first-child, td.text { text-align: left; }
tr:nth-child(even) { background: #f7f7f7; } .interval { color: #888; font-size: 11px; white-space: nowrap; }
.wide { overflow-x: auto; } pre { background: #f5f5f5; padding: 10px; overflow-x: auto; font-size: 12px; }
.coloured { font: 13px/1.55 ui-monospace, monospace; white-space: pre-wrap; border: 1px solid #eee; padding: 8px; }
.agrees { color: #177a2e; } .disagrees { color: #b3261e; } .open { color: #8a6d00; } p.note { color: #555; }
"""
_ACTION_SCALE = [
    [0, "#e6e6e6"],
    [0.33, "#e6e6e6"],
    [0.33, "#1f77b4"],
    [0.67, "#1f77b4"],
    [0.67, "#ff7f0e"],
    [1, "#ff7f0e"],
]
_ACTION_COLORS = dict(zip(ACTIONS, ("#cccccc", "#1f77b4", "#ff7f0e"), strict=True))


def page(folder: Path) -> str:
    """The page of the run in a folder.

    Raises:
        FileNotFoundError: there is no run, or a part of it is missing.
        ValueError: a file is not JSON.
    """
    if not any((folder / name).is_file() for name in ("comparison.json", "settings.json")):
        raise FileNotFoundError(f"no run in {folder}: neither comparison.json nor a paper run's settings.json is there")
    return _comparison_page(folder) if (folder / "comparison.json").is_file() else _paper_page(folder)


def write(folder: Path) -> Path:
    """Write `report.html` for the run in a folder, and return its path; errors as for `page`."""
    path = folder / "report.html"
    path.write_text(page(folder))
    return path


# A comparison


def _comparison_page(folder: Path) -> str:
    comparison = Comparison.load(folder / "comparison.json")
    settings = comparison.settings
    parts = [
        "<h2>Loss against compute</h2>",
        chart(_frontier(comparison)),
        "<p class='note'>Bars: 95 % interval of the paired difference to best fixed.</p>",
        "<h2>All routers</h2>",
        _comparison_table(comparison),
    ]
    if (folder / "budgets.json").is_file():
        for text, found in json.loads((folder / "budgets.json").read_text())["texts"].items():
            parts += _budgets(text, found)
    if (folder / "traces.json").is_file():
        parts += _traces(json.loads((folder / "traces.json").read_text()))
    return _page("Comparison of routers", settings, parts)


def _frontier(comparison: Comparison) -> Figure:
    figure = Figure()
    for kind, dash in (("fixed", "solid"), ("oracle", "dot")):
        points = comparison.frontiers[kind]
        label = f"{kind} per number of big layers ({points[0]['context']})"
        hover = [f"{point['big']} big" for point in points]
        line = {"dash": dash, "color": "#999"}
        figure.add_scatter(x=_column(points, "compute"), y=_column(points, "loss"), name=label, text=hover, line=line)
    for row in comparison.rows:
        low, high = around(row, "loss", "loss_minus_fixed")
        figure.add_scatter(
            x=[row["compute"]],
            y=[row["loss"]],
            error_y=_bars([row["loss"]], [low], [high]),
            name=row["router"],
            mode="markers",
            marker={"size": 10},
            visible=True if row["loss"] < comparison.frontiers["fixed"][0]["loss"] + 0.5 else "legendonly",
        )
    return _axes(figure, "compute (FFN FLOPs / all-big)", "loss (nats per token)")


_COLUMNS = {
    "loss": "loss",
    "perplexity": "perplexity",
    "compute": "compute",
    "flops_per_token": "FLOPs per token",
    "return": "return",
    "return_minus_fixed": "return minus best fixed",
    "loss_minus_fixed": "loss minus best fixed",
    "regret": "regret",
    "agreement": "agreement",
    "tokens_per_second": "tokens / s",
}


def _comparison_table(comparison: Comparison) -> str:
    rows = []
    for row in comparison.rows:
        cells = "".join(_cell(row[key], row[f"{key}_interval"], key) for key in _COLUMNS)
        rows.append(f"<tr><td>{escape(row['router'])}{'*' if row['sees_label'] else ''}</td>{cells}</tr>")
    head = "".join(f"<th>{title}</th>" for title in ("router", *_COLUMNS.values()))
    note = (
        "Routed context; regret and agreement in the reference context. Below each number its 95 % bootstrap interval "
        "over windows. * sees the label: a bound, not a rival."
    )
    body = f"<table id='routers'><tr>{head}</tr>{''.join(rows)}</table>"
    return f"<div class='wide'>{body}</div><p class='note'>{note}</p>"


def _cell(value: float, interval: Sequence[float], key: str, digits: int = 3) -> str:
    spread = f"<span class='interval'>{' to '.join(_short(end, digits) for end in interval)}</span>"
    return f"<td data-key='{key}' data-value='{value!r}'>{_short(value, digits)}<br>{spread}</td>"


def _short(value: float, digits: int = 3) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}f}"


def _budgets(text: str, found: Numbers) -> list[str]:
    """Routers at equal compute: their frontiers, and their losses at the targets with the difference to each rival."""
    figure = Figure()
    for router in found["routers"]:
        steps = router["frontier"]
        below = [step["loss"] - step["interval"][0] for step in steps]
        above = [step["interval"][1] - step["loss"] for step in steps]
        bars = {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "thickness": 0.5}
        figure.add_scatter(x=_column(steps, "compute"), y=_column(steps, "loss"), error_y=bars, name=router["router"])
    note = "Means over seeds; bars and intervals: 95 %, over seeds and windows. Differences are paired by window."
    return [
        f"<h2>At equal compute: {escape(text)}</h2>",
        chart(_axes(figure, "compute (FFN FLOPs / all-big)", "loss (nats per token)")),
        _budget_table(found["rows"]),
        f"<p class='note'>{note}</p>",
    ]


def _budget_table(rows: Sequence[Numbers]) -> str:
    names = list(dict.fromkeys(row["router"] for row in rows))
    titles = ("router", "compute", "loss", *(f"minus {name}" for name in names))
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    lines = []
    for row in rows:
        cells = [f"<td>{escape(row['router'])}</td><td>{row['target']:g}</td>"]
        cells += ["<td></td>" if row["loss"] is None else _cell(row["loss"], row["loss_interval"], "loss", 4)]
        for name in names:
            against = row["minus"].get(name)
            cells += [_cell(against["difference"], against["interval"], name, 4) if against else "<td></td>"]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<div class='wide'><table class='budgets'><tr>{head}</tr>{''.join(lines)}</table></div>"


def _traces(traces: Numbers) -> list[str]:
    routers = traces["routers"]
    maps = {name: found["share_of_big"] for name, found in routers.items()}
    routes = {name: found["routes"] for name, found in routers.items()}
    difficulty = ["<h2>Token difficulty</h2>", _both_colourings(traces["difficulty"])] if traces["difficulty"] else []
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
            figure.add_bar(y=shares, name=action, marker_color=_ACTION_COLORS[action], visible=place == 0)
    _choice(figure, list(routers), len(ACTIONS))
    figure.update_layout(barmode="stack")
    return _axes(figure, "layer", "share of the tokens")


# A paper run


def _paper_page(folder: Path) -> str:
    figures = {path.stem.removeprefix("figure-"): json.loads(path.read_text()) for path in folder.glob("figure-*.json")}
    settings = json.loads((folder / "settings.json").read_text())
    if missing := [name for name in STUDIED if name not in figures]:
        raise FileNotFoundError(f"{folder} lacks figure-{missing[0]}.json")
    parts = ["<h2>The paper's claims</h2>", _claims_table(figures), "<h2>Loss against compute (4b)</h2>"]
    for text, contexts in figures["4b"]["texts"].items():
        for context in ("reference", "routed"):
            parts += [f"<h3>{escape(text)}, {context} context; bars: paired difference to all-big</h3>"]
            parts += [chart(_curves(contexts[context]))]
    parts += ["<h2>Share of big by layer and position (2, 3)</h2>", chart(heat_maps(_paper_maps(figures), "position"))]
    parts += ["<h2>Random patterns (4a)</h2>", chart(_histograms(figures["4a"]))]
    parts += ["<h2>Budgets along the sequence (4c)</h2>", chart(_schedules(figures["4c"]))]
    for text, found in figures["7"]["texts"].items():
        parts += [f"<h2>Routes of one sequence (7): {escape(text)}</h2>"]
        parts += [chart(route_maps(found["routes"], found["tokens"]))]
    for text, rows in figures["6"]["texts"].items():
        parts += [f"<h2>Token difficulty (6): {escape(text)}</h2>", _both_colourings(rows)]
    for name in ("8a", "8b", "8c"):
        for text, models in figures.get(name, {"texts": {}})["texts"].items():
            parts += [f"<h2>Dense models and frozen big ({name}): {escape(text)}</h2>", chart(_scaling(models))]
    return _page(f"Duo-LLM on {settings['model']}", settings, parts)


def _claims_table(figures: Mapping[str, Numbers]) -> str:
    rows = "".join(
        f"<tr><td>{c.figure}</td><td class='text'>{escape(c.paper)}</td><td class='text'>{escape(c.text)}</td>"
        f"<td class='text'>{escape(c.measured)}</td><td class='{c.verdict}'>{c.verdict}</td></tr>"
        for c in claims(figures)
    )
    head = "".join(f"<th>{title}</th>" for title in ("figure", "the paper", "text", "measured here", "verdict"))
    return f"<div class='wide'><table id='claims'><tr>{head}</tr>{rows}</table></div>"


def _curves(kinds: Mapping[str, Sequence[Numbers]]) -> Figure:
    figure = Figure()
    for kind, unsorted_points in kinds.items():
        points = sorted(unsorted_points, key=lambda point: point["compute"])
        paired = [point | {"loss_interval": around(point, "loss", "minus_all_big")} for point in points]
        _line(figure, _column(points, "compute"), paired, "loss", kind, [f"{point['big']:.1f} big" for point in points])
    return _axes(figure, "compute (FFN FLOPs / all-big)", "loss (nats per token)")


def _line(
    figure: Figure, xs: Sequence[float], points: Sequence[Numbers], key: str, name: str, hover: Sequence[str]
) -> None:
    low, high = zip(*(point[f"{key}_interval"] for point in points), strict=True)
    values = _column(points, key)
    figure.add_scatter(x=xs, y=values, error_y=_bars(values, low, high), name=name, text=hover)


def _bars(values: Sequence[float], low: Sequence[float], high: Sequence[float]) -> Numbers:
    """Plotly's error bars from intervals."""
    above = [top - value for top, value in zip(high, values, strict=True)]
    below = [value - bottom for bottom, value in zip(low, values, strict=True)]
    return {"symmetric": False, "array": above, "arrayminus": below}


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
            name = f"{text}: {key.replace('_', ' ')}"
            figure.add_scatter(x=[found[key]["mean"]] * 2, y=[0, 8], mode="lines", name=name)
    return _axes(figure, "loss (nats per token)", "patterns")


def _schedules(numbers: Numbers) -> Figure:
    figure = Figure()
    for text, found in numbers["texts"].items():
        values = [schedule["minus_constant"] for schedule in found.values()]
        low, high = zip(*(schedule["minus_constant_interval"] for schedule in found.values()), strict=True)
        figure.add_bar(x=list(found), y=values, name=text, error_y=_bars(values, low, high))
    return _axes(figure, "budget along the sequence", "loss minus constant (nats)")


def _scaling(models: Mapping[str, Sequence[Numbers]]) -> Figure:
    figure = Figure()
    for name, points in models.items():
        _line(figure, _column(points, "big_share"), points, "accuracy", name, [point["model"] for point in points])
    return _axes(figure, "share of big; dense: the same FLOPs", "accuracy of the next token")


# What both are made of


def chart(figure: Figure) -> str:
    """A plotly figure as a piece of a page that holds plotly's script."""
    return figure.to_html(include_plotlyjs=False, full_html=False, config={"displaylogo": False})


def heat_maps(maps: Mapping[str, Sequence[Sequence[float]]], x: str) -> Figure:
    """Layer x position matrices with values in [0, 1], one shown at a time."""
    figure = Figure()
    for place, matrix in enumerate(maps.values()):
        figure.add_heatmap(z=matrix, zmin=0, zmax=1, colorscale="Viridis", visible=place == 0)
    _choice(figure, list(maps), 1)
    return _axes(figure, x, "layer")


def route_maps(routes: Mapping[str, Sequence[Sequence[int]]], tokens: Sequence[str]) -> Figure:
    """Action codes by layer and token, (L, T), one router shown at a time; the token is in the hover text."""
    figure = Figure()
    for place, matrix in enumerate(routes.values()):
        hover = [[f"{escape(repr(t))}: {ACTIONS[a]}" for t, a in zip(tokens, row, strict=True)] for row in matrix]
        figure.add_heatmap(
            z=matrix,
            zmin=0,
            zmax=2,
            text=hover,
            hoverinfo="text",
            colorscale=_ACTION_SCALE,
            colorbar={"tickvals": [0.33, 1, 1.67], "ticktext": list(ACTIONS)},
            visible=place == 0,
        )
    _choice(figure, list(routes), 1)
    return _axes(figure, "token", "layer")


def _choice(figure: Figure, names: Sequence[str], traces_each: int) -> None:
    """A menu that shows one name's traces at a time."""
    buttons = [
        {
            "label": name,
            "method": "update",
            "args": [{"visible": [i // traces_each == place for i in range(len(figure.data))]}],
        }
        for place, name in enumerate(names)
    ]
    figure.update_layout(updatemenus=[{"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.2}])


def _axes(figure: Figure, x: str, y: str) -> Figure:
    figure.update_layout(template="plotly_white", margin={"l": 60, "r": 20, "t": 50, "b": 50}, height=420)
    return figure.update_xaxes(title=x).update_yaxes(title=y)


def coloured_text(rows: Sequence[Numbers], key: str) -> str:
    """Tokens on a colour from white to dark red for `key` in nats, 6 and more; the numbers are in the tooltips."""
    scale, spans = colormaps["OrRd"], []
    for row in rows:
        red, green, blue = (round(255 * part) for part in scale(min(max(row[key], 0) / 6, 1))[:3])
        ink = "#fff" if row[key] > 4 else "#222"
        tip = f"all-small {row['all_small']:.2f}, difficulty {row['difficulty']:.2f}"
        style = f"background:rgb({red},{green},{blue});color:{ink}"
        spans.append(f"<span style='{style}' title='{tip}'>{escape(row['token'])}</span>")
    return f"<div class='coloured'>{''.join(spans)}</div>"


def _both_colourings(rows: Sequence[Numbers]) -> str:
    return (
        f"<h3>(a) coloured by the loss under all-small</h3>{coloured_text(rows, 'all_small')}"
        f"<h3>(b) coloured by difficulty, what compute can still remove</h3>{coloured_text(rows, 'difficulty')}"
    )


def text_page(title: str, settings: Numbers, rows: Sequence[Numbers]) -> str:
    """A page of coloured text alone, without charts."""
    return _page(title, settings, [_both_colourings(rows)], charts=False)


def _page(title: str, settings: Numbers, parts: Sequence[str], *, charts: bool = True) -> str:
    script = f"<script>{get_plotlyjs()}</script>" if charts else ""
    config = escape(
        yaml.safe_dump({key: value for key, value in settings.items() if key != "command"}, sort_keys=False)
    )
    return (
        f"<!DOCTYPE html><html lang='en'><head><meta charset='utf-8'><title>{escape(title)}</title>"
        f"<link rel='icon' href='data:,'><style>{_STYLE}</style>{script}</head><body><h1>{escape(title)}</h1>"
        f"<p>Repeat it with</p><pre id='command'>{escape(settings['command'])}</pre>{''.join(parts)}"
        f"<h2>Configuration</h2><pre>{config}</pre></body></html>"
    )


def _column(points: Sequence[Numbers], key: str) -> list[float]:
    return [point[key] for point in points]
