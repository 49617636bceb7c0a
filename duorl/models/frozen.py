"""Checks that a model is frozen: routers are trained, the model is not."""

from __future__ import annotations

from torch import nn


def require_frozen(model: nn.Module) -> None:
    """Refuse a model with trainable parameters.

    Raises:
        ValueError: a parameter is trainable; the message names the first one.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            raise ValueError(f"the model must be frozen, but {name} is trainable: call model.requires_grad_(False)")
