"""Whether a router fits a model: the model's sizes, and the model that the router was trained for.

A trained router takes states of one model; on another one, of the same sizes even, its decisions mean nothing. So a
training leaves in its router what identifies the model, and whatever lets a router decide asks here first.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duorl.costs import SMALL

if TYPE_CHECKING:
    from duorl.models import DuoForCausalLM
    from duorl.routers.base import Router

_TOLERANCE = 0.01  # of a weight: loading in another precision moves it by less
_LEAST = 1e-6  # float16 has no finer numbers


def identity(model: DuoForCausalLM) -> dict[str, Any]:
    """What tells a model from others, JSON values.

    Returns:
        `name`, for messages; `family`, `layers`, `hidden_size`; `compute`, what an all-small pass costs; and `weights`,
        one of each layer's big network and one of its small one, 2 L numbers.
    """
    networks = [network for ffn in model.stack.ffns for network in (ffn.big, ffn.small)]
    matrices = [next(p for p in network.parameters() if p.ndim >= 2) for network in networks]
    return {
        "name": Path(model.name_or_path or "").name,
        "family": model.config.backbone.model_type,
        "layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "compute": model.flops.compute[:, SMALL].sum().item(),
        "weights": [float(f"{matrix.flatten()[0].item():.5g}") for matrix in matrices],
    }


def require_fit(router: Router, model: DuoForCausalLM) -> None:
    """Refuse a router that cannot decide for a model.

    Raises:
        ValueError: it is made for other sizes, or was trained for another model; says for which.
    """
    name = type(router).__name__
    layers, hidden_size = router.sizes()
    for what, needed, found in (("layers", layers, model.num_layers), ("hidden size", hidden_size, model.hidden_size)):
        if needed is not None and needed != found:
            raise ValueError(f"{name} is made for a model of {what} {needed}, this one has {found}: give its own model")
    known = router.trained_for
    if known is not None and not _same(known, identity(model)):
        here = identity(model)["name"] or "this one"
        raise ValueError(f"{name} was trained for the model {_called(known)}, not for {here}: give it, or train anew")


def _same(known: dict[str, Any], found: dict[str, Any]) -> bool:
    exact = ("family", "layers", "hidden_size")
    if any(known.get(key) != found[key] for key in exact) or len(known["weights"]) != len(found["weights"]):
        return False
    pairs = zip([known["compute"], *known["weights"]], [found["compute"], *found["weights"]], strict=True)
    return all(math.isclose(one, other, rel_tol=_TOLERANCE, abs_tol=_LEAST) for one, other in pairs)


def _called(known: dict[str, Any]) -> str:
    sizes = f"{known.get('family')}, {known.get('layers')} layers of width {known.get('hidden_size')}"
    return f"{known.get('name') or 'without a name'} ({sizes})"


def checked_record(record: Any) -> dict[str, Any] | None:
    """The record of a model in a saved router.

    Raises:
        ValueError: it is none that `identity` makes.
    """
    if record is None:
        return None
    numbers = [record.get("compute"), *record["weights"]] if _has_weights(record) else [None]
    if not all(isinstance(number, float | int) for number in numbers):
        raise ValueError("its record `model` of the model it was trained for is broken: remove it or save anew")
    return record


def _has_weights(record: Any) -> bool:
    return isinstance(record, dict) and isinstance(record.get("weights"), list)
