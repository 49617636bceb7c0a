"""Checks that several options use."""

from __future__ import annotations


def require_positive(**numbers: float) -> None:
    """Refuse counts below 1, by name.

    Raises:
        ValueError: a count is below 1; the message names the first one.
    """
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, not {number}")
