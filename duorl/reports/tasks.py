"""Accuracy on tasks as tables."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from duorl.markdown import grid

Rows = Sequence[dict[str, Any]]
HEAD = ("task", "questions", "router", "compute", "metric", "value", "minus all-big", "minus fixed mix")
NOTE = (
    "In brackets the 95 % interval over the questions; differences are paired by question. Fixed mix: the best mixture "
    "of two fixed routers of this table at the same compute; these questions decide which two."
)


def tasks_markdown(rows: Rows) -> str:
    """A line per task, router and metric."""
    return grid(HEAD, (_cells(row, name) for row, name in _lines(rows)), numbers=(1, 3, 5, 6, 7))


def tasks_table(rows: Rows) -> str:
    """The same as HTML."""
    head = "".join(f"<th>{title}</th>" for title in HEAD)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in _cells(row, name))}</tr>" for row, name in _lines(rows)
    )
    return f"<div class='wide'><table id='tasks'><tr>{head}</tr>{body}</table></div><p class='note'>{NOTE}</p>"


def _lines(rows: Rows) -> list[tuple[dict[str, Any], str]]:
    return [(row, name) for row in rows for name in row["metrics"]]


def _cells(row: dict[str, Any], name: str) -> list[str]:
    metric = row["metrics"][name]
    value = _number(metric["value"], metric["interval"])
    difference = _number(metric["minus_all_big"], metric["minus_interval"], sign="+")
    mix = metric.get("minus_mix")  # not in older files
    against = "" if mix is None else _number(mix, metric["minus_mix_interval"], sign="+")
    return [
        row["task"],
        f"{row['questions']}",
        row["router"],
        f"{row['compute']:.2f}",
        name,
        value,
        difference,
        against,
    ]


def _number(value: float, interval: Sequence[float] | None, sign: str = "") -> str:
    if interval is None:
        return f"{value:{sign}.3f}"
    low, high = interval
    return f"{value:{sign}.3f} ({low:{sign}.3f}, {high:{sign}.3f})"
