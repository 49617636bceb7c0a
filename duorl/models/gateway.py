"""The gateway to what others made: every configuration, tokenizer and model of transformers is loaded here.

Code in a model's folder never runs, and nobody is asked whether it may. Weights are safetensors or GGUF, never pickles.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
    with _without_code(place):
        config = transformers.AutoConfig.from_pretrained(place, **{**more, **_NO_CODE})
    attention = getattr(config, "_attn_implementation", None)
    if "/" in str(attention):
        raise ValueError(f"its configuration names attention code on the hub, {attention!r}: remove it")
    return config


def load_tokenizer(place: Any, **more: Any) -> PreTrainedTokenizerBase:
    """A tokenizer; `more` as in `AutoTokenizer.from_pretrained`."""
    with _without_code(place):
        return transformers.AutoTokenizer.from_pretrained(place, **{**more, **_NO_CODE})


def load_fast_tokenizer(place: Any, *args: Any, **more: Any) -> PreTrainedTokenizerBase:
    """The tokenizer in a file `tokenizer.json`; `more` as in `PreTrainedTokenizerFast.from_pretrained`."""
    return transformers.PreTrainedTokenizerFast.from_pretrained(place, *args, **{**more, **_NO_CODE})


def load_model(place: Any, *, kind: Any = None, **more: Any) -> Any:
    """A model of a class, by default the one that its configuration names; `more` as in
    `AutoModelForCausalLM.from_pretrained`, where some of it returns (model, info)."""
    with _without_code(place):
        kind = kind or transformers.AutoModelForCausalLM
        return kind.from_pretrained(place, **{**more, **_NO_CODE, "use_safetensors": True})


def fresh_model(config: PreTrainedConfig, **more: Any) -> PreTrainedModel:
    """A model with new weights; `more` as in `AutoModelForCausalLM.from_config`."""
    with _without_code(config.model_type):
        return transformers.AutoModelForCausalLM.from_config(config, **{**more, **_NO_CODE})


@contextmanager
def _without_code(what: Any) -> Iterator[None]:
    """transformers' own advice would be to trust the code."""
    try:
        yield
    except ValueError as problem:
        if "trust_remote_code" not in str(problem):
            raise
        fix = "give a model of one of transformers' own families"
        raise ValueError(f"{what} needs code of its own, which DuoRL never runs: {fix}") from problem


def quieten() -> None:
    """Switch off the progress bars and warnings of transformers: bad input gets one line."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
