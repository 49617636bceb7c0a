"""Make a duo model from a Hugging Face causal language model; its FFNs become the big networks."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from duorl.models.calls import Skip
from duorl.models.config import DuoConfig
from duorl.models.convertible import check_model, check_skip
from duorl.models.families import family_of, small_size
from duorl.models.modeling import DuoForCausalLM

_PROBE = 8  # tokens for the comparison of a converted model with its original


@torch.no_grad()
def convert(model: PreTrainedModel, *, small_ratio: int = 16, skip: Skip = "ffn") -> DuoForCausalLM:
    """Add a small feed-forward network to every layer of a decoder.

    The small networks have random weights. Train them with `duorl convert` or `duorl pretrain` before you use them.
    At its peak, the memory holds the given model, the duo model, and one weight more: weights that are taken over are
    allocated once, and nothing is initialised that is overwritten.

    Args:
        model: a transformers causal language model of a family in docs/reference/families.md. It does not change.
        small_ratio: inner size of big divided by that of small (the paper: 16).
        skip: what the action `skip` leaves out, see `DuoConfig`.

    Returns:
        A trainable duo model with copies of the weights, on the same device and each in the same precision. Buffers
        that transformers computes, for example rotary frequencies, are float32, as in a loaded model.

    Raises:
        ValueError: the model cannot be converted, or all-big does not give the original's logits; says why.
    """
    check_model(model)
    check_skip(model, skip)
    size = small_size(model.config, small_ratio)
    with no_init_weights():
        duo = DuoForCausalLM(DuoConfig(backbone=_plain_config(model), small_size=size, skip=skip))
    duo.tie_weights()
    _take_over(duo.backbone, model)
    duo.generation_config = copy.deepcopy(model.generation_config)
    duo.train(model.training)
    nn.Module.to(duo, device=model.device)
    check_all_big(duo, model)
    return duo


def _plain_config(model: PreTrainedModel) -> dict[str, Any]:
    """Its configuration with the precision that the weights have; what is copied from a GGUF is not quantized."""
    fields = {**model.config.to_dict(), "dtype": str(model.dtype).removeprefix("torch.")}
    fields.pop("quantization_config", None)
    return fields


def _take_over(backbone: PreTrainedModel, model: PreTrainedModel) -> None:
    """Copy all weights, those of a layer's network to its big one, and give the small ones the same precision.

    Raises:
        ValueError: the model's weights are not those that its configuration describes.
    """
    family = family_of(model.config)
    given = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in backbone.named_parameters():
        is_small, own = f".{family.ffn}.small." in name, given.get(family.original_name(name))
        if own is None or not (is_small or own.shape == parameter.shape):
            place = f"{type(model).__name__}: {family.original_name(name)} is not what its configuration describes"
            raise ValueError(f"{place}; merge adapters before you convert")
        parameter.data = (parameter if is_small else own).detach().to(own.dtype, copy=True)
    buffers = {name: tensor for name, tensor in model.state_dict().items() if name not in given}
    backbone.load_state_dict(buffers, strict=False)


def check_all_big(duo: DuoForCausalLM, original: PreTrainedModel) -> None:
    """Compare a layer-by-layer all-big pass with the forward pass of the original.

    Raises:
        ValueError: they differ, so routes in this family would give wrong results; or they are not finite.
    """
    inputs = torch.arange(1, _PROBE + 1, device=original.device)[None] % original.config.vocab_size
    family = type(original).__name__
    modes = duo.training, original.training
    duo.eval(), original.eval()
    try:
        expected = original(input_ids=inputs).logits
        error = (duo.stack.logits(duo.stack.all_big(inputs)) - expected).abs().max() / expected.abs().max()
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as problem:
        raise ValueError(f"{family} cannot be run layer by layer: {' '.join(str(problem).split())}") from problem
    finally:
        duo.train(modes[0]), original.train(modes[1])
    if not expected.isfinite().all():
        raise ValueError(f"{family}: {_not_finite(original)}")
    if not error <= max(1e-4, 8 * torch.finfo(original.dtype).eps):  # lower precisions add up in another order
        raise ValueError(f"{family}: all-big differs from the original's logits by {error:.1e} of their size")


def _not_finite(model: PreTrainedModel) -> str:
    """Why a model's logits are not finite: names the first weight that is not."""
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            return f"{name} holds numbers that are not finite"
    dtype = str(model.dtype).removeprefix("torch.")
    return f"its logits are not finite in {dtype}, although its weights are: load it in float32"
