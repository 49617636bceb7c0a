"""Write a whole model with its tokenizer; what was trained in float32 in the precision that it came in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from duorl.models.gateway import load_config
from duorl.models.modeling import DuoForCausalLM
from duorl.models.shared import writing_model


def precisions(model: DuoForCausalLM, given: str | None, fresh: torch.dtype) -> dict[str, torch.dtype]:
    """The precision in which each weight of an untrained model is saved later, by name.

    A model that was given keeps its own, so weights that are not trained stay the same to the bit.

    Args:
        model: in float32.
        given: folder of the model that it was made from; None for a fresh model.
        fresh: precision of a fresh model.
    """
    if given is None:
        return dict.fromkeys(dict(model.named_parameters()), fresh)
    dtype: Any = load_config(given).dtype or torch.float32
    small = {id(weight) for ffn in model.stack.ffns for weight in ffn.small.parameters()}
    # A model may hold single weights in a higher precision than it names.
    fits = {name: id(weight) in small or _fits(weight, dtype) for name, weight in model.named_parameters()}
    return {name: dtype if fits[name] else torch.float32 for name in fits}


def _fits(weight: Tensor, dtype: torch.dtype) -> bool:
    return torch.equal(weight.to(dtype).to(weight.dtype), weight)


def round_weights(model: DuoForCausalLM, precisions: Mapping[str, torch.dtype]) -> None:
    """Give each weight its precision, by name."""
    for name, weight in model.named_parameters():
        weight.data = weight.to(precisions[name])


def save(model: DuoForCausalLM, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Write a whole model and its tokenizer, both or neither."""
    with writing_model(out) as beside:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
