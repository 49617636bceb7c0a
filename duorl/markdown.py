"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A table with one line per row; its columns are the keys, in the order in which they come."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return grid(names, ([_shown(row.get(name, "")) for name in names] for row in rows))


def grid(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Collection[int] = ()) -> str:
    """A table with a line per row of texts.

    Args:
        head: the names of the columns.
        rows: one text per column.
        numbers: the columns that are aligned at the right.
    """
    rule = ["---:" if column in numbers else "---" for column in range(len(head))]
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *rows))


def facts(values: dict[str, Any]) -> str:
    """Values by name as one table; lists of objects as tables of their own, each under its name."""
    tables = {name: value for name, value in values.items() if _is_table(value)}
    plain = [{"": name, " ": value} for name, value in values.items() if name not in tables]
    return "\n".join([table(plain), *(f"{name}:\n\n{table(rows)}" for name, rows in tables.items())])


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
