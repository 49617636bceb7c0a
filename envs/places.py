"""Places in a text where episodes begin, and the routes from there: drawn, chosen by the user, checked, and printed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from duorl.envs.dynamics import RoutingDynamics


def checked_actions(dynamics: RoutingDynamics, actions: Any) -> Tensor:
    """Choices as (N,) int64.

    Raises:
        ValueError: they are not N whole numbers, or not all among the actions.
    """
    given, count = np.asarray(actions), len(dynamics.compute) if not dynamics.done else None
    if given.ndim > 1 and 1 in given.shape:
        given = given.reshape(-1)
    if count is not None and given.shape != (count,):
        raise ValueError(f"give one action per token, shape ({count},), not {given.shape}")
    names = dynamics.actions
    if not np.issubdtype(given.dtype, np.integer) or not ((given >= 0) & (given < len(names))).all():
        raise ValueError(f"actions are whole numbers from 0 to {len(names) - 1} ({', '.join(names)}), not {actions}")
    return torch.from_numpy(given.astype(np.int64))


def chosen_place(drawn: dict[str, int], options: Mapping[str, Any] | None) -> dict[str, int]:
    """The place of an episode: the drawn one, changed by the options of `reset`.

    Raises:
        ValueError: an option is unknown, or no whole number.
    """
    place = dict(drawn)
    for name, value in (options or {}).items():
        if name == "reset_mask":
            continue
        if name not in place:
            raise ValueError(f"reset has the options window and position, not {name!r}")
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise ValueError(f"reset: {name} must be a whole number, not {value!r}")
        place[name] = int(value)
    return place


def drawn_route(place: Mapping[str, int], route: Sequence[str], layers: int) -> str:
    """A route so far as text."""
    marks = "".join({"skip": ".", "small": "s", "big": "B"}[name] for name in route).ljust(layers, "_")
    return f"window {place['window']} position {place['position']}: {marks}"


def draw_place(windows: Tensor, generator: np.random.Generator) -> dict[str, int]:
    """A uniformly drawn token: its window and its position there."""
    count, length = windows.shape
    return {"window": int(generator.integers(count)), "position": int(generator.integers(length - 1))}


def places_to_tensors(windows: Tensor, places: Sequence[dict[str, int]]) -> tuple[Tensor, Tensor]:
    """The windows (B, T+1) and positions (B, 1) of some tokens.

    Raises:
        ValueError: a window or position is out of range.
    """
    count, length = windows.shape
    for place in places:
        if not (0 <= place["window"] < count and 0 <= place["position"] < length - 1):
            raise ValueError(f"{place} is out of range: there are {count} windows of {length - 1} tokens")
    tokens = windows[[place["window"] for place in places]]
    return tokens, torch.tensor([[place["position"]] for place in places])


def objects(values: Iterable[Any]) -> np.ndarray:
    """An array (N,) of objects; NumPy does not unpack them."""
    return np.array([*values, None], dtype=object)[:-1]
