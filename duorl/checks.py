"""Checks that several options use."""

from __future__ import annotations


class BadInput(ValueError):
    """Input that a run cannot use, found only while it works. To resume would not help."""


def require_seed(seed: int) -> None:
    """Refuse a seed that not all generators take.

    Raises:
        ValueError: it is below 0, or has more than 32 bits.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in 0 to {2**32 - 1}, not {seed}")


def require_positive(**numbers: float) -> None:
    """Refuse counts below 1, by name.

    Raises:
        ValueError: a count is below 1; the message names the first one.
    """
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, not {number}")
