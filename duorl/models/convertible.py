"""Which models of transformers can become duo models. docs/reference/families.md lists them.

What cannot is refused here in one line, from the configuration if that is enough: before weights are loaded.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from duorl.models.families import EXPERTS_REFUSED, family_of, find_layers, inner_size, require_no_experts

RECURRENT = {
    *("bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "mamba", "mamba2", "nemotron_h"),
    *("recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2"),
}
"""Families in which layers have a state-space or recurrent block, in place of attention or of the network."""

_COPIED = {torch.float64, torch.float32, torch.float16, torch.bfloat16}


def check_config(config: PreTrainedConfig) -> None:
    """Check what a configuration says about a model that shall be converted.

    Raises:
        ValueError: it cannot be converted; says why.
    """
    family, text = config.model_type, config.get_text_config()
    if family == "duo":
        raise ValueError("the model is a duo already: its networks are big and small ones")
    if config.is_encoder_decoder:
        raise ValueError(f"{family} is an encoder-decoder; only decoders alone can be converted")
    if text is not config:
        known = type(text) in MODEL_FOR_CAUSAL_LM_MAPPING
        alone = f"; convert its language model ({text.model_type}) alone" if known else ""
        raise ValueError(f"{family} reads more than text{alone}")
    if family in RECURRENT:
        other = "give a model in which every layer has attention and a feed-forward network"
        raise ValueError(f"{family} has state-space or recurrent layers: {other}")
    method = _quantization(config)
    if method not in (None, "gguf"):  # transformers dequantizes what it reads from a GGUF file
        fix = "and cannot be copied: give the unquantized model"
        raise ValueError(f"{family}: its weights are quantized ({method}) {fix}")
    require_no_experts(config)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{family}: transformers' AutoModelForCausalLM has no language model of this family")


def check_model(model: PreTrainedModel) -> None:
    """Check a model that shall be converted, without running it.

    Raises:
        ValueError: it cannot be converted; says why.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"convert takes a causal language model of transformers, not a {name}")
    check_config(model.config)
    kind = cast(type[PreTrainedModel], MODEL_FOR_CAUSAL_LM_MAPPING[type(model.config)])
    if not isinstance(model, kind):
        raise ValueError(f"{name} does not predict the next token: load it with AutoModelForCausalLM ({kind.__name__})")
    if any(module.endswith("experts") for module, _ in model.named_modules()):
        raise ValueError(f"{name}: {EXPERTS_REFUSED}")
    for weight, values in model.named_parameters():
        if values.device.type == "meta":
            raise ValueError(f"{name}: {weight} is not in memory: load the model without offloading")
        if values.dtype not in _COPIED:
            dtype = str(values.dtype).removeprefix("torch.")
            fix = "quantized weights cannot be copied: give the unquantized model"
            raise ValueError(f"{name}: {weight} is {dtype}: {fix}")
    find_layers(model)
    inner_size(model.config)


def check_skip(model: PreTrainedModel, skip: str) -> None:
    """Check that a model's layers can leave out what `skip` names.

    Raises:
        ValueError: they cannot.
    """
    if skip == "block" and any(map(family_of(model.config).normalizes_sum, find_layers(model))):
        raise ValueError(f"{type(model).__name__}: its norms come after its sums, so use skip='ffn', not 'block'")


def _quantization(config: PreTrainedConfig) -> str | None:
    """The method of quantized weights, as the configuration names it."""
    found: Any = getattr(config, "quantization_config", None)
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return str(getattr(method, "value", method))
