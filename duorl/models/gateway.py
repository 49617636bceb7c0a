"""The gateway to what others made: every configuration, tokenizer and model of transformers is loaded here.

Code in a model's folder never runs, and nobody is asked whether it may. Weights are safetensors or GGUF, never pickles.
"""

from __future__ import annotations

from typing import Any

import transformers  # its classes by their whole names: to import one may import this module, see `duorl.auto`
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_NO_CODE: dict[str, Any] = {"trust_remote_code": False}


def load_config(place: Any, **more: Any) -> PreTrainedConfig:
    """A configuration; `more` as in `AutoConfig.from_pretrained`.

    Raises:
        ValueError: it needs code of its own, or names code on the hub for its attention.
        OSError, ...: as in transformers.
    """
    config = transformers.AutoConfig.from_pretrained(place, **{**more, **_NO_CODE})
    attention = getattr(config, "_attn_implementation", None)
    if "/" in str(attention):
        raise ValueError(f"its configuration names attention code on the hub, {attention!r}: remove it")
    return config


def load_tokenizer(place: Any, **more: Any) -> PreTrainedTokenizerBase:
    """A tokenizer; `more` as in `AutoTokenizer.from_pretrained`."""
    return transformers.AutoTokenizer.from_pretrained(place, **{**more, **_NO_CODE})


def load_fast_tokenizer(place: Any, *args: Any, **more: Any) -> PreTrainedTokenizerBase:
    """The tokenizer in a file `tokenizer.json`; `more` as in `PreTrainedTokenizerFast.from_pretrained`."""
    return transformers.PreTrainedTokenizerFast.from_pretrained(place, *args, **{**more, **_NO_CODE})


def load_model(place: Any, **more: Any) -> Any:
    """A model; `more` as in `AutoModelForCausalLM.from_pretrained`, where some of it returns (model, info)."""
    return transformers.AutoModelForCausalLM.from_pretrained(place, **{**more, **_NO_CODE, "use_safetensors": True})


def fresh_model(config: PreTrainedConfig, **more: Any) -> PreTrainedModel:
    """A model with new weights; `more` as in `AutoModelForCausalLM.from_config`."""
    return transformers.AutoModelForCausalLM.from_config(config, **{**more, **_NO_CODE})
