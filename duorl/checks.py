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


def in_words(error: BaseException) -> str:
    """What an error says to a user: its words, and its class where they alone say little."""
    if isinstance(error, OSError) and error.strerror is not None:  # of the operating system, with a number
        return error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"
    return str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"
