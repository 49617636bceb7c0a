"""Checks that a router fits a model: its sizes, and the model for which it was trained.

A trained router reads hidden states of one model. On another model, even with the same sizes, its decisions have no
meaning. So training stores a record of the model in the router, and the record is checked before the router is used.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from duorl.costs import SMALL

if TYPE_CHECKING:
    from duorl.models import DuoForCausalLM
    from duorl.routers.base import Router

_TOLERANCE = 0.01  # relative change of a weight; another precision changes it less
_LEAST = 1e-6  # smaller numbers are not exact in float16


class UnusableRouter(ValueError):
    """A router that cannot be loaded, or cannot decide for a model. A run that meets one in its folder says so."""


def identity(model: DuoForCausalLM) -> dict[str, Any]:
    """The record of a model, JSON values.

    Returns:
        `name`, for messages; `family`, `layers`, `hidden_size`; `compute` of an all-small pass; and `weights`, one
        weight of each layer's big network and one of its small network, 2 L numbers.
    """
    networks = [network for ffn in model.stack.ffns for network in (ffn.big, ffn.small)]
    return {
        "name": Path(model.name_or_path or "").name,
        "family": model.config.backbone.model_type,
        "layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "compute": model.flops.compute[:, SMALL].sum().item(),
        "weights": [float(f"{_first_weight(network):.5g}") for network in networks],
    }


def _first_weight(network: nn.Module) -> float:
    """The first number of a network's first matrix, also if it is on the disk."""
    from accelerate.utils import align_module_device

    owner, name = next(
        (module, name)
        for module in network.modules()
        for name, weight in module.named_parameters(recurse=False)
        if weight.ndim >= 2
    )
    with align_module_device(owner):
        return owner.get_parameter(name).flatten()[0].item()


def require_fit(router: Router, model: DuoForCausalLM) -> None:
    """Refuse a router that cannot decide for a model.

    Raises:
        UnusableRouter: the router has other sizes, or was trained for another model; the message names it.
    """
    name = type(router).__name__
    layers, hidden_size = router.sizes()
    for what, needed, found in (("layers", layers, model.num_layers), ("hidden size", hidden_size, model.hidden_size)):
        if needed is not None and needed != found:
            said = f"{name} is made for a model of {what} {needed}, this one has {found}"
            raise UnusableRouter(f"{said}: give its own model")
    known = router.trained_for
    if known is not None and not same_model(known, identity(model)):
        here = identity(model)["name"] or "this one"
        said = f"{name} was trained for the model {_called(known)}, not for {here}"
        raise UnusableRouter(f"{said}: give that model, or train anew")


def same_model(known: dict[str, Any], found: dict[str, Any]) -> bool:
    """Whether two records of `identity` are of one model, in any precision."""
    exact = ("family", "layers", "hidden_size")
    if any(known.get(key) != found[key] for key in exact) or len(known["weights"]) != len(found["weights"]):
        return False
    pairs = zip([known["compute"], *known["weights"]], [found["compute"], *found["weights"]], strict=True)
    return all(math.isclose(one, other, rel_tol=_TOLERANCE, abs_tol=_LEAST) for one, other in pairs)


def _called(known: dict[str, Any]) -> str:
    sizes = f"{known.get('family')}, {known.get('layers')} layers of width {known.get('hidden_size')}"
    return f"{known.get('name') or 'without a name'} ({sizes})"


def checked_record(record: Any) -> dict[str, Any] | None:
    """Check the record of a model in a saved router.

    Raises:
        ValueError: the record does not have the form of `identity`.
    """
    if record is None:
        return None
    numbers = [record.get("compute"), *record["weights"]] if _has_weights(record) else [None]
    if not all(isinstance(number, float | int) for number in numbers):
        raise ValueError("its record `model` of the model it was trained for is broken: remove it or save anew")
    return record


def _has_weights(record: Any) -> bool:
    return isinstance(record, dict) and isinstance(record.get("weights"), list)
