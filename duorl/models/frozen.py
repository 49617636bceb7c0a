"""Whether a model is frozen: routers are trained beside one that stays as it is."""

from __future__ import annotations

from torch import nn


def require_frozen(model: nn.Module) -> None:
    """Refuse a model that would be trained along.

    Raises:
        ValueError: a parameter is trainable; names the first.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            raise ValueError(f"the model must be frozen, but {name} is trainable: call model.requires_grad_(False)")
