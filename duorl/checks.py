"""Checks that several options share."""

from __future__ import annotations


def require_positive(**numbers: float) -> None:
    """Refuse counts below 1, by name.

    Raises:
        ValueError: names the first and what it must be.
    """
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, not {number}")
