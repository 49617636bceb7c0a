"""The names of the parts of decoders, for each model family.

A family whose layers have the structure of Llama needs no entry here. Every other family has one entry in `FAMILIES`,
with the differences, and one line in the table in tests/conftest.py. If a family does not work, `duorl.convert` finds
this out, because it compares the converted model with the original.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

STEERED = "duorl"
"""The attention function of `duorl.models.attention`, by its name in transformers' attention interface."""

# Names of the number of experts; mixtures of experts already route tokens and are not supported.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class Family:
    """The names of a decoder's parts; by default those of Llama.

    Attributes:
        ffn: a layer's feed-forward network.
        attention: a layer's attention block; several names if layers have different ones.
        ffn_norm: a layer's norm of the network's output, before this is added to the residual stream; None without.
        multiplier: a layer's factor on the network's output; None if it is 1.
        inner_size: the network's inner size in the configuration; if its value is None, 4 times the hidden size.
        attention_function: its name in transformers. Families whose attention does not use the attention interface
            have routed passes, but no reference context.
        layer_returns_tuple: a layer returns a tuple whose first element is the hidden state.
    """

    ffn: str = "mlp"
    attention: tuple[str, ...] = ("self_attn",)
    ffn_norm: str | None = None
    multiplier: str | None = None
    inner_size: str = "intermediate_size"
    attention_function: str = STEERED
    layer_returns_tuple: bool = False

    def completed(self, layer: nn.Module, residual: Tensor, output: Tensor) -> Tensor:
        """Output of a layer: its network's output is added to the residual stream, all (..., d)."""
        if self.ffn_norm is not None and hasattr(layer, self.ffn_norm):
            output = getattr(layer, self.ffn_norm)(output)
        if self.multiplier is not None:
            output = output * getattr(layer, self.multiplier)
        return residual + output


_LLAMA = Family()
_NORM_AFTER = Family(ffn_norm="post_feedforward_layernorm")
_GPT = Family(attention=("attn",), inner_size="n_inner")

FAMILIES: dict[str, Family] = {
    "codegen": _GPT,
    "exaone4": _NORM_AFTER,
    "falcon": Family(
        attention=("self_attention",),
        inner_size="ffn_hidden_size",
        attention_function="sdpa",
        layer_returns_tuple=True,
    ),
    "gemma2": _NORM_AFTER,
    "gemma3_text": _NORM_AFTER,
    "glm4": Family(ffn_norm="post_mlp_layernorm"),
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gpt_neo": Family(attention=("attn",), attention_function="eager", layer_returns_tuple=True),
    "gpt_neox": Family(attention=("attention",)),
    "gptj": _GPT,
    "granite": Family(multiplier="residual_multiplier"),
    "olmo2": _NORM_AFTER,
    "olmo3": _NORM_AFTER,
    "olmo_hybrid": Family(attention=("self_attn", "linear_attn"), ffn_norm="post_feedforward_layernorm"),
    "qwen3_5_text": Family(attention=("self_attn", "linear_attn")),
}
"""By `model_type` of transformers; a family that is not listed has the names of `Family()`."""


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a decoder's configuration."""
    return FAMILIES.get(config.model_type, _LLAMA)


def find_layers(backbone: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers: the longest list of modules that each have a feed-forward network.

    Raises:
        ValueError: the model has no such list.
    """
    name = family_of(backbone.config).ffn
    lists = [m for m in backbone.modules() if isinstance(m, nn.ModuleList) and len(m)]
    stacks = [m for m in lists if all(isinstance(getattr(layer, name, None), nn.Module) for layer in m)]
    if not stacks:
        raise ValueError(f"{type(backbone).__name__}: no decoder layers with an `{name}` module, so nothing to route")
    return max(stacks, key=len)


def attention_of(layer: nn.Module, config: PreTrainedConfig) -> nn.Module:
    """A layer's attention block.

    Raises:
        ValueError: the layer has no module with the name that the family gives.
    """
    names = family_of(config).attention
    for name in names:
        if isinstance(block := getattr(layer, name, None), nn.Module):
            return block
    raise ValueError(f"{_unknown(config)}: a layer has no `{' or '.join(names)}` module")


def inner_size_name(config: PreTrainedConfig) -> str:
    """Name of the field with a decoder's FFN inner size.

    Raises:
        ValueError: the configuration has no single number for all layers, or the networks are mixtures of experts.
    """
    count = max(_number(getattr(config, name, None)) for name in _EXPERTS)
    if count > 1:
        raise ValueError(f"{config.model_type}: its networks are mixtures of experts, which route by themselves")
    name = family_of(config).inner_size
    if not hasattr(config, name) or isinstance(getattr(config, name), list | tuple):
        raise ValueError(f"{_unknown(config)}: its configuration has no single FFN inner size `{name}`")
    return name


def inner_size(config: PreTrainedConfig) -> int:
    """A decoder's FFN inner size; for GPT-2 without a value, 4 times the hidden size."""
    name = inner_size_name(config)
    size = getattr(config, name)
    if size is not None and (not isinstance(size, int) or size < 1):
        raise ValueError(f"{config.model_type}: {name} must be at least 1, not {size!r}")
    return 4 * config.hidden_size if size is None else size


def attention_width(config: PreTrainedConfig) -> int:
    """Number of attention heads times head size."""
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return head_size * config.num_attention_heads


def _unknown(config: PreTrainedConfig) -> str:
    return f"{config.model_type} is not built as duorl.models.families says"


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 0
