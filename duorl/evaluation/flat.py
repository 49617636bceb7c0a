"""Nested numbers as one line of names and values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def flatten(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values of a nested dictionary with dotted names; intervals become `.low` and `.high`."""
    for key, value in row.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        elif (key.endswith("_interval") or prefix.endswith("_interval.")) and isinstance(value, (list, tuple)):
            yield from ((f"{prefix}{key}.{end}", bound) for end, bound in zip(("low", "high"), value, strict=True))
        else:
            yield f"{prefix}{key}", value
