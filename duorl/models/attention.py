"""Attention in the `reference` context: position t reads the stored keys and values before t, and its own.

It is registered with the attention interface of transformers as `STEERED`. Without an active memory, it is plain
scaled-dot-product attention. With a memory, it first records the keys and values of an all-big pass; then several
routes of the same tokens can read them.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from duorl.models.families import STEERED
from duorl.models.memory import Memory, active_memory


def _per_query_head(module: nn.Module, states: Tensor) -> Tensor:
    groups = getattr(module, "num_key_value_groups", 1)
    return states if groups == 1 else states.repeat_interleave(groups, dim=1)


def steered_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options
) -> tuple[Tensor, None]:
    """An attention function for the attention interface of transformers.

    Args:
        module: the attention block; `layer_idx` is its place in the memory.
        query: (n * B, H, P, k), n branches of the B sequences in the memory.
        key, value: (n * B, H_kv, P, k), of the same tokens.
        attention_mask: used without a memory only, because windows have no padding.
        options: `scaling`, `sliding_window`, `softcap` from the families.

    Returns:
        Shape (n * B, P, H, k), and None for the weights.

    Raises:
        ValueError: the family calls it twice in a layer, so that one memory per layer does not hold what it reads.
    """
    memory, layer = active_memory(), cast(int, module.layer_idx)
    if memory is None:
        return _plain(module, query, key, value, attention_mask, options), None
    every_key, every_value = _per_query_head(module, key), _per_query_head(module, value)
    if memory.mode == "record":
        if layer in memory.stored:  # only the last keys and values would be read
            said = "a layer's attention runs more than once, so it has no reference context"
            raise ValueError(f"{type(module).__name__}: {said}; use context='routed'")
        memory.stored[layer] = every_key.contiguous(), every_value.contiguous()
        return _plain(module, query, key, value, attention_mask, options), None
    key, value = every_key, every_value
    if memory.mode == "commit":
        memory.commit(layer, key, value)
    return _read(memory, module, query, key, value, options), None


def _plain(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict) -> Tensor:
    if options.get("softcap") is None:
        return sdpa_attention_forward(module, query, key, value, mask, **options)[0]
    # transformers' sdpa has no softcap (Gemma 2).
    key, value = _per_query_head(module, key), _per_query_head(module, value)
    scores = _capped(_scaled(query, key.shape[-1], options) @ key.transpose(2, 3), options)
    if mask is None:
        mask = torch.ones_like(scores, dtype=torch.bool).tril(scores.shape[3] - scores.shape[2])
    # Not -inf: a padding token sees nothing, and its NaN would spread.
    return (scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1) @ value).transpose(1, 2)


def _read(memory: Memory, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: dict) -> Tensor:
    stored_key, stored_value = memory.looked_at(cast(int, module.layer_idx))  # (B, H, S, k)
    if options.get("s_aux") is not None:
        raise NotImplementedError(f"{type(module).__name__}: attention sinks have no reference context")
    batch, heads, length, size = stored_key.shape
    branches, queries = len(query) // batch, query.shape[2]

    def fold(states: Tensor) -> Tensor:
        # Branches are part of the query axis: one product per head for all branches, and keys are not copied.
        states = states.view(branches, batch, heads, queries, -1).permute(1, 2, 0, 3, 4)
        return states.reshape(batch, heads, branches * queries, -1)

    query, key, value = fold(_scaled(query, size, options)), fold(key), fold(value)
    index = memory.positions.repeat(1, branches)[:, None, :, None].expand(-1, heads, -1, 1)
    scores = query @ stored_key.transpose(2, 3)  # (B, H, n * P, S)
    scores.scatter_(3, index, (query * key).sum(-1, keepdim=True))
    scores = _capped(scores, options).unflatten(2, (branches, queries))
    hidden = _hidden(memory.positions, length, options)[:, :, None]  # (B, 1, 1, P, S)
    weights = scores.masked_fill_(hidden, -torch.inf).flatten(2, 3).softmax(-1)
    own = weights.gather(3, index)
    # The token's own value replaces the stored value at its position. Gradients need the softmax unchanged.
    others = weights.scatter(3, index, 0.0) if weights.requires_grad else weights.scatter_(3, index, 0.0)
    output = others @ stored_value + own * value
    output = output.view(batch, heads, branches, queries, -1).permute(2, 0, 3, 1, 4)
    return output.reshape(branches * batch, queries, heads, -1)


def _scaled(query: Tensor, size: int, options: dict) -> Tensor:
    return query * (options.get("scaling") or size**-0.5)


def _capped(scores: Tensor, options: dict) -> Tensor:
    softcap = options.get("softcap")
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def _hidden(positions: Tensor, length: int, options: dict) -> Tensor:
    """Which stored positions are hidden from a query: (B, 1, P, S)."""
    behind = positions[:, None, :, None] - torch.arange(length, device=positions.device)
    window = options.get("sliding_window") or length
    return (behind < 0) | (behind >= window)


AttentionInterface.register(STEERED, steered_attention)
AttentionMaskInterface.register(STEERED, sdpa_mask)
