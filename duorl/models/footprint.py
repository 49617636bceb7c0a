"""The memory of a duo model and of its passes, from the sizes in its configuration: docs/explanation/performance.md."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, cast

import torch

from duorl.devices import require_memory
from duorl.models.families import attention_width, inner_size

if TYPE_CHECKING:
    from duorl.models.config import DuoConfig
    from duorl.models.modeling import DuoForCausalLM

Keeps = Literal["nothing", "states", "errors", "everything"]
"""What a pass keeps until its end: nothing; the states that heads learn from (PPO, REINFORCE); the inputs and errors of
small networks that learn each by itself (stage regress of convert); or everything that derivatives through the model
need (ReinMax, Soft, stage distil)."""

_LOGITS_AT_ONCE = {"cpu": 2**20}  # elements of the head's output that fit into a processor's cache
_MANY_LOGITS = 2**26  # on an accelerator, to bound its memory
_LEAST_ROWS = 256  # each part reads the head's weights again
_FLOAT = 4  # bytes of float32: of norms, logits, and what heads read
_STATES, _INNER, _FLOATS = 8, 4, 8  # tensors of hidden size, of inner size and in float32 that a layer has at a time
_KEPT_STATES, _KEPT_INNER, _KEPT_FLOATS = 5, 4, 4  # those that derivatives need later


def head_rows(vocabulary: int, device: torch.device) -> int:
    """Number of tokens whose logits are computed at the same time."""
    return max(_LEAST_ROWS, _LOGITS_AT_ONCE.get(device.type, _MANY_LOGITS) // vocabulary)


def weight_bytes(config: DuoConfig, dtype: torch.dtype) -> int:
    """Bytes of a model's weights, an upper bound: networks count as gated.

    Args:
        config: the model's configuration.
        dtype: precision of the weights.
    """
    backbone = config.backbone
    width = backbone.hidden_size
    attention = 2 * width * (attention_width(backbone) + _keys_width(backbone))
    ffns = 3 * width * (inner_size(backbone) + config.small_size)
    tables = (1 if getattr(backbone, "tie_word_embeddings", True) else 2) * backbone.vocab_size * width
    return dtype.itemsize * (backbone.num_hidden_layers * (attention + ffns) + tables)


def peak_bytes(
    config: DuoConfig,
    tokens: int,
    dtype: torch.dtype,
    *,
    keeps: Keeps = "nothing",
    device: torch.device | None = None,
) -> int:
    """Bytes of a routed pass beside the weights: activations of one layer, logits of `head_rows` tokens, what is kept.

    Args:
        config: the model's configuration.
        tokens: number of tokens in flight: windows, times their length, times their copies.
        dtype: precision of the model.
        keeps: what is kept until the end of the pass.
        device: device of the pass; by default the processor.
    """
    backbone, size = config.backbone, dtype.itemsize
    width, inner = backbone.hidden_size, inner_size(backbone)
    heads = 2 * (attention_width(backbone) + _keys_width(backbone))
    layer = size * (_STATES * width + heads + _INNER * inner) + _FLOATS * _FLOAT * width
    kept = {
        "nothing": 0,
        "states": _FLOAT * width,
        "errors": 2 * _FLOAT * width + size * _KEPT_INNER * config.small_size,
        "everything": size * (_KEPT_STATES * width + heads + _KEPT_INNER * inner) + _KEPT_FLOATS * _FLOAT * width,
    }
    rows = min(tokens, head_rows(backbone.vocab_size, device or torch.device("cpu")))
    head = rows * backbone.vocab_size * (size + 2 * _FLOAT)
    if size < _FLOAT:
        head += backbone.vocab_size * width * size  # a product in low precision reorders its weights
    return tokens * (layer + backbone.num_hidden_layers * kept[keeps]) + head


def require_room(model: DuoForCausalLM, tokens: int, keeps: Keeps, fix: str, beside: int = 0) -> None:
    """Refuse more tokens at once than the free memory of the model's device holds.

    Args:
        model: a loaded duo model.
        tokens, keeps: see `peak_bytes`.
        fix: what the user can change.
        beside: bytes that are needed at the same time, for example of an optimizer.

    Raises:
        ValueError: says how much is needed and how much is free.
    """
    needed = beside + peak_bytes(cast("DuoConfig", model.config), tokens, model.dtype, keeps=keeps, device=model.device)
    require_memory(needed, model.device, f"{tokens:,} tokens at once", fix)


def _keys_width(backbone) -> int:
    """Number of key-value heads times head size."""
    heads = backbone.num_attention_heads
    return attention_width(backbone) // heads * (getattr(backbone, "num_key_value_heads", None) or heads)
