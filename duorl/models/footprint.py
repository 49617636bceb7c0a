"""The memory of a duo model and of its passes, from the sizes in its configuration, before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from duorl.models.families import attention_width, inner_size

if TYPE_CHECKING:
    from duorl.models.config import DuoConfig

Keeps = Literal["nothing", "states", "everything"]
"""What a pass keeps until its end: nothing; the states that heads learn from (PPO, REINFORCE); or everything that
derivatives through the model need (ReinMax, Soft)."""

_STATES = 8  # tensors of hidden size in one layer: stream, norms, and copies that are grouped by action
_INNER = 4  # tensors of inner size in one network
_FLOAT = 4  # bytes of float32
_LOGITS = 2  # copies of the logits, in float32


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
    config: DuoConfig, tokens: int, dtype: torch.dtype, *, keeps: Keeps = "nothing", head_rows: int = 256
) -> int:
    """Bytes of a routed pass beside the weights.

    A pass has the activations of one layer at a time, and the logits of `head_rows` tokens. A learner keeps more.

    Args:
        config: the model's configuration.
        tokens: number of tokens in flight: windows, times their length, times their copies.
        dtype: precision of the model.
        keeps: what is kept until the end of the pass.
        head_rows: tokens whose logits are computed at the same time.
    """
    backbone, size = config.backbone, dtype.itemsize
    width, layers = backbone.hidden_size, backbone.num_hidden_layers
    attention = 2 * attention_width(backbone) + 2 * _keys_width(backbone)
    layer = size * (_STATES * width + attention + _INNER * inner_size(backbone)) + _STATES * _FLOAT * width
    kept = {"nothing": 0, "states": _FLOAT * width, "everything": layer}[keeps]
    logits = min(head_rows, tokens) * backbone.vocab_size * (size + _LOGITS * _FLOAT)
    return tokens * (layer + layers * kept) + logits


def _keys_width(backbone) -> int:
    """Number of key-value heads times head size."""
    heads = backbone.num_attention_heads
    return attention_width(backbone) // heads * (getattr(backbone, "num_key_value_heads", None) or heads)
