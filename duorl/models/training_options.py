"""Checks the options of stage 1 for TrainingArguments of transformers, before anything is written."""

from __future__ import annotations

import types
from dataclasses import fields
from typing import Any, Union, get_args, get_origin, get_type_hints

from transformers import TrainingArguments

from duorl.devices import Dtype

# Options that stage 1 sets itself, or that do not work with its model and loss.
_OURS = {
    "output_dir": "give out",
    "resume_from_checkpoint": "give --resume",
    "remove_unused_columns": "text has one column",
    "label_smoothing_factor": "the loss is plain cross-entropy",
    "gradient_checkpointing": "its second pass would run without the routes",
    "activation_checkpointing": "its second pass would run without the routes",
    "load_best_model_at_end": "the last weights are saved",
    "use_liger_kernel": "its kernels replace the networks that are routed",
    "push_to_hub": "the folder is yours to publish",
}
_AT_LEAST = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), 1),
    **dict.fromkeys(("save_total_limit", "eval_accumulation_steps", "dataloader_prefetch_factor"), 1),
    **dict.fromkeys(("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "adam_beta1", "adam_beta2"), 0),
    **dict.fromkeys(("adam_epsilon", "dataloader_num_workers", "eval_delay", "seed", "data_seed"), 0),
}
_ABOVE_0 = ("num_train_epochs", "logging_steps", "eval_steps", "save_steps")


def in_precision(given: dict[str, Any], dtype: Dtype) -> dict[str, Any]:
    """Options of a training in mixed precision, or none; `auto`: as they are."""
    return given if dtype == "auto" else {**given, "bf16": dtype == "bfloat16", "fp16": dtype == "float16"}


def training_arguments(given: dict[str, Any], **defaults: Any) -> TrainingArguments:
    """The arguments of a training.

    Args:
        given: options of the user.
        defaults: values of options that the user did not set, and `output_dir`.

    Raises:
        ValueError: an option is unknown, is set by stage 1, or has a bad value; the message names it.
    """
    kinds = get_type_hints(TrainingArguments)
    known = {field.name: field for field in fields(TrainingArguments)}
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"training: transformers.TrainingArguments has no option {name!r}")
        if name in _OURS and value not in (None, False, 0):
            raise ValueError(f"training.{name} is not for stage 1 to take: {_OURS[name]}")
        if not _is_of(value, kinds[name]):
            raise ValueError(f"training.{name} must be {_words(kinds[name])}, not {value!r}")
        if (choices := known[name].metadata.get("choices")) and value not in choices:
            raise ValueError(f"training.{name} must be one of {', '.join(map(str, choices))}, not {value!r}")
        _require_range(name, value)
    given = {name: value for name, value in given.items() if name not in _OURS}
    try:
        return TrainingArguments(**{**defaults, **given})
    except Exception as error:  # transformers raises errors of many classes
        said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"training: {said}") from error


def _require_range(name: str, value: Any) -> None:
    if value is None or isinstance(value, str):
        return
    if name in _AT_LEAST and value < _AT_LEAST[name]:
        raise ValueError(f"training.{name} must be at least {_AT_LEAST[name]}, not {value}")
    if name in _ABOVE_0 and value <= 0:
        raise ValueError(f"training.{name} must be above 0, not {value}")
    if name == "max_steps" and value < 1 and value != -1:
        raise ValueError(f"training.max_steps must be at least 1, or -1 for whole epochs, not {value}")


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value has a type; types that are not plain are left to transformers."""
    if get_origin(kind) in (Union, types.UnionType):
        return any(_is_of(value, part) for part in get_args(kind))
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind in (bool, str, type(None)):
        return isinstance(value, kind)
    return True


def _words(kind: Any) -> str:
    parts = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    return " or ".join(getattr(part, "__name__", str(part)).replace("NoneType", "null") for part in parts)
