"""The memory of a duo model and of its passes, from the sizes in its configuration: docs/explanation/performance.md."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

import torch

from duorl.devices import require_memory
from duorl.models.families import (
    MASKED_KERNEL,
    Context,
    attention_width,
    family_of,
    hides_distant,
    inner_size,
    keys_width,
    linear_layers,
    linear_width,
)

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
_CPU = torch.device("cpu")
_FLOAT = 4  # bytes of float32: of norms, logits, and what heads read
_STATES, _INNER, _FLOATS = 8, 4, 8  # tensors of hidden size, of inner size and in float32 that a layer has at a time
_KEPT_STATES, _KEPT_INNER, _KEPT_FLOATS = 5, 4, 4  # those that derivatives need later
_MAPPED, _GAPS = 2**25, 2  # glibc keeps tensors below this size in a heap, where kept ones leave gaps
_MATRICES, _KEPT_MATRICES = 15, 16  # float32 tensors of `linear_width` in a layer; those that derivatives need later


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
    attention = 2 * width * (attention_width(backbone) + keys_width(backbone))
    ffns = 3 * width * (inner_size(backbone) + config.small_size)
    tables = (1 if getattr(backbone, "tie_word_embeddings", True) else 2) * backbone.vocab_size * width
    return dtype.itemsize * (backbone.num_hidden_layers * (attention + ffns) + tables)


@dataclass(frozen=True)
class Batch:
    """What a pass has at once.

    Attributes:
        windows: number of windows, times their copies.
        length: tokens of a window, T.
        keeps: what is kept until the end of the pass.
        context: see `duorl.routed_pass`.
    """

    windows: int
    length: int
    keeps: Keeps = "nothing"
    context: Context = "routed"

    @property
    def tokens(self) -> int:
        """Number of tokens in flight."""
        return self.windows * self.length


def peak_bytes(config: DuoConfig, batch: Batch, dtype: torch.dtype, *, device: torch.device = _CPU) -> int:
    """Bytes of a routed pass beside the weights: the sum of four parts.

    They are the activations of one layer; what attention has of its scores, which grows with the square of the length;
    the logits of `head_rows` tokens; and what is kept of all layers. In the reference context, keys and values are too.

    Args:
        config: the model's configuration.
        batch: what the pass has at once.
        dtype: precision of the model.
        device: device of the pass; by default the processor.
    """
    backbone, size = config.backbone, dtype.itemsize
    width, inner = backbone.hidden_size, inner_size(backbone)
    heads = 2 * (attention_width(backbone) + keys_width(backbone))
    layer = size * (_STATES * width + heads + _INNER * inner) + _FLOATS * _FLOAT * width
    kept = {
        "nothing": 0,
        "states": _FLOAT * width,
        "errors": 2 * _FLOAT * width + size * _KEPT_INNER * config.small_size,
        "everything": size * (_KEPT_STATES * width + heads + _KEPT_INNER * inner) + _KEPT_FLOATS * _FLOAT * width,
    }
    rows = min(batch.tokens, head_rows(backbone.vocab_size, device))
    head = rows * backbone.vocab_size * (size + 2 * _FLOAT)
    if size < _FLOAT:
        head += backbone.vocab_size * width * size  # a product in low precision reorders its weights
    scores = score_bytes(config, batch, dtype)
    if device.type == "cpu" and _FLOAT * batch.tokens * batch.length * backbone.num_attention_heads < _MAPPED:
        scores *= _GAPS
    linear = _linear_bytes(config, batch.keeps)
    per_token = layer + backbone.num_hidden_layers * kept[batch.keeps] + scores + linear
    if batch.context == "reference":
        per_token += stored_bytes(config, attention_width(backbone), dtype)
    return batch.tokens * per_token + head


def score_bytes(config: DuoConfig, batch: Batch, dtype: torch.dtype) -> int:
    """Bytes per token of what attention has of its scores: of T tokens, each has H scores for each of the T.

    Args:
        config: the model's configuration.
        batch: what the pass has at once.
        dtype: precision of the model.
    """
    backbone = config.backbone
    learning = backbone.num_hidden_layers - linear_layers(backbone) if batch.keeps == "everything" else 0
    held = [family_of(backbone).held(backbone, batch.context)]
    if hides_distant(backbone, batch.length):
        held.append(MASKED_KERNEL)
    shown = sum(one.bytes(backbone.num_attention_heads, dtype.itemsize, learning) for one in held)
    return math.ceil(batch.length * shown)


def _linear_bytes(config: DuoConfig, keeps: Keeps) -> int:
    """Bytes per token of linear attention: it has matrices in place of scores."""
    layers = linear_layers(config.backbone)
    kept = _KEPT_MATRICES * layers if keeps == "everything" else 0
    return _FLOAT * (_MATRICES + kept) * linear_width(config.backbone) if layers else 0


def stored_bytes(config: DuoConfig, width: int, dtype: torch.dtype) -> int:
    """Bytes per token of the keys and values of all layers.

    Args:
        config: the model's configuration.
        width: number of stored heads times their size: `attention_width` or `keys_width`.
        dtype: precision of the model.
    """
    return 2 * width * config.backbone.num_hidden_layers * dtype.itemsize


def require_room(model: DuoForCausalLM, batch: Batch, fix: str, beside: int = 0) -> None:
    """Refuse more at once than the free memory of the model's device holds.

    Args:
        model: a loaded duo model.
        batch: what a pass has at once.
        fix: what the user can change.
        beside: bytes that are needed at the same time, for example of an optimizer.

    Raises:
        ValueError: says how much is needed and how much is free.
    """
    needed = beside + peak_bytes(cast("DuoConfig", model.config), batch, model.dtype, device=model.device)
    require_memory(needed, model.device, f"{batch.tokens:,} tokens at once", fix)
