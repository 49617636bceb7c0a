"""The price of compute, in nats per all-big pass: checks, ranges of prices, and random prices."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def check_price(price: float) -> float:
    """Check a price and return it.

    Raises:
        ValueError: the price is below 0 or not a number.
    """
    if not 0 <= price < math.inf:
        raise ValueError(f"price must be at least 0 nats per all-big pass, not {price}")
    return price


def check_prices(prices: Sequence[float]) -> tuple[float, float]:
    """Check a range of prices; returns the lowest and the highest.

    Raises:
        ValueError: there are not two, or the first is not below the second, or not above 0.
    """
    if len(prices) != 2 or not 0 < prices[0] < prices[1] < math.inf:
        raise ValueError(f"prices must be the lowest and the highest, 0 < lowest < highest, not {list(prices)}")
    return float(prices[0]), float(prices[1])


def draw_prices(prices: tuple[float, float], count: int, generator: torch.Generator) -> Tensor:
    """Draw prices uniformly on a log scale, (count,)."""
    low, high = prices
    return low * torch.exp(torch.rand(count, generator=generator) * math.log(high / low))


def ladder(prices: tuple[float, float], rungs: int) -> list[float]:
    """Rising prices, evenly spaced in a range on a log scale, with both ends."""
    low, high = check_prices(prices)
    rising = [low * (high / low) ** (rung / max(1, rungs - 1)) for rung in range(rungs)]
    return [min(price, high) for price in rising]  # rounding errors may exceed the end
