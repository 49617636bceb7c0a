"""Parts of the report's pages: plotly charts, coloured text, and the page itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import yaml
from plotly.graph_objects import Figure
from plotly.offline import get_plotlyjs

from duorl.colours import ink, of_loss
from duorl.costs import ACTIONS

Numbers = dict[str, Any]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.6em; } h2 { font-size: 1.2em; margin-top: 2.2em; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; font-size: 13px; } td, th { padding: 3px 9px; text-align: right; }
th { border-bottom: 1px solid #999; } td:first-child, th:first-child, td.text { text-align: left; }
tr:nth-child(even) { background: #f7f7f7; } .interval { color: #888; font-size: 11px; white-space: nowrap; }
.wide { overflow-x: auto; } pre { background: #f5f5f5; padding: 10px; overflow-x: auto; font-size: 12px; }
.coloured { font: 13px/1.55 ui-monospace, monospace; white-space: pre-wrap; border: 1px solid #eee; padding: 8px; }
code { white-space: pre; }
.agrees { color: #177a2e; } .disagrees { color: #b3261e; } .open { color: #8a6d00; } p.note { color: #555; }
"""
ACTION_COLORS = dict(zip(ACTIONS, ("#cccccc", "#1f77b4", "#ff7f0e"), strict=True))
_ACTION_SCALE = [
    [0, "#e6e6e6"],
    [0.33, "#e6e6e6"],
    [0.33, "#1f77b4"],
    [0.67, "#1f77b4"],
    [0.67, "#ff7f0e"],
    [1, "#ff7f0e"],
]


def chart(figure: Figure) -> str:
    """A plotly figure as HTML, for a page with plotly's script."""
    return figure.to_html(include_plotlyjs=False, full_html=False, config={"displaylogo": False})


def heat_maps(maps: Mapping[str, Sequence[Sequence[float]]], x: str) -> Figure:
    """Matrices (layer x position) with values in [0, 1]; a menu chooses one."""
    figure = Figure()
    for place, matrix in enumerate(maps.values()):
        figure.add_heatmap(z=matrix, zmin=0, zmax=1, colorscale="Viridis", visible=place == 0)
    choice(figure, list(maps), 1)
    return by_layer(figure, x, len(next(iter(maps.values()), ())))


def route_maps(routes: Mapping[str, Sequence[Sequence[int]]], tokens: Sequence[str]) -> Figure:
    """Action codes by layer and token, (L, T); a menu chooses the router. The hover text has the token."""
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
    choice(figure, list(routes), 1)
    return by_layer(figure, "token", len(next(iter(routes.values()), ())))


def choice(figure: Figure, names: Sequence[str], traces_each: int) -> None:
    """Add a menu that shows the traces of one name."""
    buttons = [
        {
            "label": name,
            "method": "update",
            "args": [{"visible": [i // traces_each == place for i in range(len(figure.data))]}],
        }
        for place, name in enumerate(names)
    ]
    figure.update_layout(updatemenus=[{"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.2}])


def axes(figure: Figure, x: str, y: str) -> Figure:
    """Set the common style of charts and the names of the axes."""
    figure.update_layout(template="plotly_white", margin={"l": 60, "r": 20, "t": 50, "b": 50}, height=420)
    return figure.update_xaxes(title=x).update_yaxes(title=y)


def by_layer(figure: Figure, x: str, layers: int) -> Figure:
    """The style of charts with one row per layer: room for each, and numbers that do not touch."""
    axes(figure, x, "layer").update_layout(height=max(420, 100 + 15 * layers))
    return figure.update_yaxes(dtick=layer_step(layers))


def layer_step(layers: int) -> int:
    """Every how many layers an axis has a number."""
    return 1 if layers <= 16 else 5


def coloured_text(rows: Sequence[Numbers], key: str) -> str:
    """Tokens with a colour for `key`, from white (0 nats) to dark red (6 nats or more); tooltips have the numbers."""
    spans = []
    for row in rows:
        colour = of_loss(row[key])
        red, green, blue = (round(255 * part) for part in colour)
        tip = f"all-small {row['all_small']:.2f}, difficulty {row['difficulty']:.2f}"
        style = f"background:rgb({red},{green},{blue});color:{ink(colour)}"
        spans.append(f"<span style='{style}' title='{tip}'>{escape(row['token'])}</span>")
    return f"<div class='coloured'>{''.join(spans)}</div>"


def both_colourings(rows: Sequence[Numbers], *, exact: bool = True) -> str:
    """The same text twice: by the loss under all-small, and by difficulty (Duo-LLM, Fig. 6), or its lower bound."""
    difficulty = (
        "difficulty (reference loss - oracle loss)" if exact else "a lower bound of difficulty, without an oracle"
    )
    return (
        f"<h3>(a) coloured by the loss under all-small</h3>{coloured_text(rows, 'all_small')}"
        f"<h3>(b) coloured by {difficulty}</h3>{coloured_text(rows, 'difficulty')}"
    )


def document(title: str, settings: Numbers, parts: Sequence[str], *, charts: bool = True) -> str:
    """A whole page: command, parts, configuration; with plotly's script if it has charts."""
    script = f"<script>{get_plotlyjs()}</script>" if charts else ""
    config = escape(
        yaml.safe_dump({key: value for key, value in settings.items() if key != "command"}, sort_keys=False)
    )
    return (
        f"<!DOCTYPE html><html lang='en'><head><meta charset='utf-8'>"
        f"<meta name='viewport' content='width=device-width, initial-scale=1'><title>{escape(title)}</title>"
        f"<link rel='icon' href='data:,'><style>{_STYLE}</style>{script}</head><body><h1>{escape(title)}</h1>"
        f"<p>Command of this run:</p><pre id='command'>{escape(settings['command'])}</pre>{''.join(parts)}"
        f"<h2>Configuration</h2><pre>{config}</pre></body></html>"
    )


def column(points: Sequence[Numbers], key: str) -> list[float]:
    """One value of every point."""
    return [point[key] for point in points]


def error_bars(values: Sequence[float], low: Sequence[float], high: Sequence[float]) -> Numbers:
    """Plotly's error bars from intervals."""
    above = [top - value for top, value in zip(high, values, strict=True)]
    below = [value - bottom for bottom, value in zip(low, values, strict=True)]
    return {"symmetric": False, "array": above, "arrayminus": below}
