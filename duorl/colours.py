"""The colours of numbers in texts: on pages, in figures and on the terminal."""

from __future__ import annotations

from matplotlib import colormaps

Colour = tuple[float, float, float]
"""Red, green and blue, each in [0, 1]."""
_DARKEST = 6.0  # nats


def of_loss(nats: float) -> Colour:
    """From white (0 nats) to dark red (6 nats or more)."""
    return colormaps["OrRd"](min(max(nats, 0.0) / _DARKEST, 1.0))[:3]  # an int would be a place in the table


def of_compute(share: float) -> Colour:
    """From pale blue (no big network) to orange (all-big)."""
    return colormaps["RdYlBu_r"](0.15 + 0.6 * min(max(share, 0.0), 1.0))[:3]


def as_hex(colour: Colour) -> str:
    """`#rrggbb`."""
    return "#" + "".join(f"{round(255 * part):02x}" for part in colour)


def ink(background: Colour) -> str:
    """White or black, whichever has the higher contrast on a background: at least 4.5, as WCAG 2.2 asks for."""
    light = luminance(background) + 0.05
    return "#ffffff" if 1.05 / light > light / 0.05 else "#000000"


def luminance(colour: Colour) -> float:
    """Relative luminance in [0, 1] (WCAG 2.2)."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
