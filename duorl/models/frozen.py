"""Checks that a model is frozen, and that a pass says what the model says: routers are trained, the model is not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from duorl.models.modeling import DuoForCausalLM


def require_frozen(model: nn.Module) -> None:
    """Refuse a model with trainable parameters.

    Raises:
        ValueError: a parameter is trainable; the message names the first one.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            raise ValueError(f"the model must be frozen, but {name} is trainable: call model.requires_grad_(False)")


def require_positions(model: DuoForCausalLM, length: int) -> None:
    """Refuse windows of so many tokens, if the model has fewer positions.

    Raises:
        ValueError: it has.
    """
    most = model.most_positions
    if most is not None and length > most:
        raise ValueError(f"a window of {length} tokens is longer than the model's {most} positions: give a smaller one")


def require_evaluation(model: DuoForCausalLM, length: int) -> None:
    """Refuse a pass over so many tokens of which the model does not say the same again, or cannot say anything.

    Raises:
        ValueError: it is in training mode, or has too few positions.
    """
    if model.training:
        raise ValueError("the model is in training mode, in which dropout is random: call model.eval()")
    require_positions(model, length)
