"""The names of the parts of decoders, for each model family.

A family whose layers have the structure of Llama needs no entry here. Every other family has one entry in `FAMILIES`,
with the differences, and one line in the table in tests/conftest.py. If a family does not work, `duorl.convert` finds
this out, because it compares the converted model with the original. docs/reference/families.md lists what converts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

STEERED = "duorl"
"""The attention function of `duorl.models.attention`, by its name in transformers' attention interface."""

# Names of the number of experts; mixtures of experts already route tokens and are not supported.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
EXPERTS_REFUSED = (
    "its networks are mixtures of experts, which route by themselves: give a model with one network per layer"
)


Context = Literal["routed", "reference"]
"""Which keys and values a token reads from the tokens before it: see `duorl.routed_pass`."""


@dataclass(frozen=True)
class Held:
    """What attention has of T x T scores at its peak, per window: an upper bound, from measurements.

    Attributes:
        scores: tensors (H, T, T) at the same time, in the model's precision; 0 if a kernel never has all scores.
        floats: the same, in float32. In low precision, too, products and softmax on a processor can need them.
        masks: bytes for each of the T x T: masks and what they are made from, which all H heads share.
        kept: tensors (H, T, T) that derivatives keep of each layer, in the model's precision.
        kept_floats: the same, in float32.
        kept_masks: bytes for each of the T x T that derivatives keep of each layer.
    """

    scores: float = 0.0
    floats: float = 0.0
    masks: int = 0
    kept: float = 0.0
    kept_floats: float = 0.0
    kept_masks: int = 0

    def bytes(self, heads: int, size: int, layers: int) -> float:
        """Bytes for each of the T x T.

        Args:
            heads: H.
            size: bytes of a number in the model's precision.
            layers: number of layers whose tensors are kept for derivatives; 0 without derivatives.
        """
        now = heads * (size * self.scores + 4 * self.floats) + self.masks
        return now + layers * (heads * (size * self.kept + 4 * self.kept_floats) + self.kept_masks)


_IN_KERNEL = Held()
MASKED_KERNEL = Held(masks=8, kept_masks=4)
"""Of a kernel that is given a mask: it takes it in float32."""
_READING = Held(floats=2, masks=12, kept=1, kept_masks=5)  # duorl.models.attention


def _through_interface(config: PreTrainedConfig, context: Context) -> Held:
    """Of `duorl.models.attention`."""
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return Held(scores=3.5, masks=16, kept=2.25, kept_masks=4)
    return _IN_KERNEL if context == "routed" else _READING


def _of_bloom(config: PreTrainedConfig, context: Context) -> Held:
    if context == "routed":
        return Held(floats=3, masks=8, kept_floats=1.75, kept_masks=2)
    return Held(floats=8, masks=24, kept_floats=2.25, kept_masks=8)


def _of_falcon(config: PreTrainedConfig, context: Context) -> Held:
    """Keys and values of one head for all heads find no kernel. ALiBi makes a mask for each head."""
    in_kernel = config.new_decoder_architecture or not config.multi_query
    if context == "reference":
        kept = 0 if in_kernel and not config.alibi else 2.25
        return Held(floats=6 if kept else 0, masks=24, kept_floats=kept, kept_masks=8)
    if not in_kernel:
        return Held(floats=2.5, masks=16, kept_floats=1.25, kept_masks=4)
    return Held(floats=2.25, masks=8, kept_masks=4) if config.alibi else MASKED_KERNEL


def _of_gpt_neo(config: PreTrainedConfig, context: Context) -> Held:
    return Held(floats=2.5, masks=8, kept_floats=1.5, kept_masks=2)


@dataclass(frozen=True)
class Family:
    """The names of a decoder's parts; by default those of Llama.

    Attributes:
        ffn: a layer's feed-forward network, or, if the layer has the `parts` itself, the last of these.
        parts: the network's modules in the order of their use, if the network is no module that maps (..., d) to
            (..., d) by itself. `big` and `small` are then sequences of these modules.
        adds_residual: the network also takes the residual stream, and returns it with the output added.
        attention: a layer's attention block; several names if layers have different ones.
        ffn_norm: a layer's norm of the network's output, before this is added to the residual stream; None without.
        sum_norm: a layer's norm of the sum, in a layer whose `do_layer_norm_before` is false; None without.
        multiplier: a layer's factor on the network's output; None if it is 1.
        inner_size: the network's inner size in the configuration; if its value is None, 4 times the hidden size. None:
            the configuration has no such field, and the size is always 4 times the hidden size.
        attention_function: its name in transformers.
        cache_argument: a layer's argument for its cache. It is named for families whose attention does not use the
            attention interface, but reads its keys from the cache and the mask alone: their reference context goes
            through it (`duorl.models.past`). Other families without the interface have routed passes only.
        bias_argument: a layer's argument for what it adds to the scores of each key, if this is not in the mask.
        layer_returns_tuple: a layer returns a tuple whose first element is the hidden state.
        held: what attention has of its scores, from the configuration and the context.
    """

    ffn: str = "mlp"
    parts: tuple[str, ...] = ()
    adds_residual: bool = False
    attention: tuple[str, ...] = ("self_attn",)
    ffn_norm: str | None = None
    sum_norm: str | None = None
    multiplier: str | None = None
    inner_size: str | None = "intermediate_size"
    attention_function: str = STEERED
    cache_argument: str = ""
    bias_argument: str = ""
    layer_returns_tuple: bool = False
    held: Callable[[PreTrainedConfig, Context], Held] = _through_interface

    @property
    def in_layer(self) -> bool:
        """Whether the layer has the network's parts itself."""
        return self.ffn in self.parts

    def network(self, layer: nn.Module) -> nn.Module:
        """A layer's feed-forward network, which maps (..., d) to (..., d)."""
        owner = layer if self.in_layer else cast(nn.Module, getattr(layer, self.ffn))
        if not self.parts:
            return owner
        return nn.Sequential(OrderedDict((part, cast(nn.Module, getattr(owner, part))) for part in self.parts))

    def replace(self, layer: nn.Module, network: nn.Module) -> None:
        """Give a layer another network; parts of the old one that the layer has itself do nothing any more."""
        for part in self.parts if self.in_layer else ():
            setattr(layer, part, nn.Identity())
        setattr(layer, self.ffn, network)

    def original_name(self, name: str) -> str:
        """Name of a weight in the original, from its name in a duo's backbone; `small` has the names of `big`."""
        owner = "." if self.in_layer else f".{self.ffn}."
        return name.replace(f".{self.ffn}.big.", owner).replace(f".{self.ffn}.small.", owner)

    def residual(self, layer: nn.Module, output: Tensor, ffn_input: Tensor) -> Tensor:
        """The stream that the network's output is added to, from the output of a layer whose network adds nothing."""
        return ffn_input if self.normalizes_sum(layer) else output

    def completed(self, layer: nn.Module, residual: Tensor, output: Tensor) -> Tensor:
        """Output of a layer: its network's output is added to the residual stream, all (..., d)."""
        if self.ffn_norm is not None and hasattr(layer, self.ffn_norm):
            output = getattr(layer, self.ffn_norm)(output)
        if self.multiplier is not None:
            output = output * getattr(layer, self.multiplier)
        total = residual + output
        return getattr(layer, cast(str, self.sum_norm))(total) if self.normalizes_sum(layer) else total

    def normalizes_sum(self, layer: nn.Module) -> bool:
        """Whether a layer's norms come after its sums, so that its network reads the residual stream itself."""
        return self.sum_norm is not None and not layer.do_layer_norm_before


_LLAMA = Family()
_NORM_AFTER = Family(ffn_norm="post_feedforward_layernorm")
_GPT = Family(attention=("attn",), inner_size="n_inner")

FAMILIES: dict[str, Family] = {
    "biogpt": Family(ffn="fc2", parts=("fc1", "activation_fn", "fc2")),
    "bloom": Family(
        parts=("dense_h_to_4h", "gelu_impl", "dense_4h_to_h"),
        adds_residual=True,
        attention=("self_attention",),
        inner_size=None,
        attention_function="eager",
        cache_argument="layer_past",
        bias_argument="alibi",
        layer_returns_tuple=True,
        held=_of_bloom,
    ),
    "codegen": _GPT,
    "exaone4": _NORM_AFTER,
    "falcon": Family(
        attention=("self_attention",),
        inner_size="ffn_hidden_size",
        attention_function="sdpa",
        cache_argument="layer_past",
        layer_returns_tuple=True,
        held=_of_falcon,
    ),
    "gemma2": _NORM_AFTER,
    "gemma3_text": _NORM_AFTER,
    "glm4": Family(ffn_norm="post_mlp_layernorm"),
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gpt_neo": Family(attention=("attn",), attention_function="eager", layer_returns_tuple=True, held=_of_gpt_neo),
    "gpt_neox": Family(attention=("attention",)),
    "gptj": _GPT,
    "granite": Family(multiplier="residual_multiplier"),
    "hyperclovax": Family(ffn_norm="post_norm2", multiplier="residual_multiplier"),
    "olmo2": _NORM_AFTER,
    "olmo3": _NORM_AFTER,
    "olmo_hybrid": Family(attention=("self_attn", "linear_attn"), ffn_norm="post_feedforward_layernorm"),
    "opt": Family(ffn="fc2", parts=("fc1", "activation_fn", "fc2"), sum_norm="final_layer_norm", inner_size="ffn_dim"),
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


def decoder_of(backbone: PreTrainedModel, layers: nn.ModuleList) -> nn.Module:
    """The part between embedding and head: the module that owns the decoder layers."""
    return next(module for module in backbone.modules() if any(child is layers for child in module.children()))


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


def require_no_experts(config: PreTrainedConfig) -> None:
    """Check that a decoder's networks are no mixtures of experts.

    Raises:
        ValueError: they are.
    """
    if not getattr(config, "is_moe", True):  # Doge names experts also where it has none
        return
    if max(_number(getattr(config, name, None)) for name in _EXPERTS) > 1:
        raise ValueError(f"{config.model_type}: {EXPERTS_REFUSED}")


def inner_size_name(config: PreTrainedConfig) -> str:
    """Name of the field with a decoder's FFN inner size.

    Raises:
        ValueError: the configuration has no single number for all layers, or the networks are mixtures of experts.
    """
    require_no_experts(config)
    name = family_of(config).inner_size
    if name is None:
        raise ValueError(f"{config.model_type}: the FFN inner size is always 4 times the hidden size")
    if not hasattr(config, name) or isinstance(getattr(config, name), list | tuple):
        raise ValueError(f"{_unknown(config)}: its configuration has no single FFN inner size `{name}`")
    return name


def inner_size(config: PreTrainedConfig) -> int:
    """A decoder's FFN inner size; for GPT-2 without a value, and for Bloom, 4 times the hidden size."""
    if family_of(config).inner_size is None:
        return 4 * config.hidden_size
    name = inner_size_name(config)
    size = getattr(config, name)
    if size is not None and (not isinstance(size, int) or size < 1):
        raise ValueError(f"{config.model_type}: {name} must be at least 1, not {size!r}")
    return 4 * config.hidden_size if size is None else size


def small_size(config: PreTrainedConfig, ratio: int) -> int:
    """Inner size of the small networks: that of big divided by a ratio, at least 1.

    Raises:
        ValueError: the ratio is below 1; or see `inner_size_name`.
    """
    if ratio < 1:
        raise ValueError(f"small_ratio must be at least 1, not {ratio}")
    return max(1, inner_size(config) // ratio)


def sized(network: nn.Module, size: int) -> nn.Module:
    """A network of `Family.parts` with another inner size and new weights."""
    up, down = (m for m in network.children() if isinstance(m, nn.Linear))
    assert isinstance(network, nn.Sequential)
    network[0] = nn.Linear(up.in_features, size, up.bias is not None, up.weight.device, up.weight.dtype)
    network[-1] = nn.Linear(size, down.out_features, down.bias is not None, down.weight.device, down.weight.dtype)
    return network


def attention_width(config: PreTrainedConfig) -> int:
    """Number of attention heads times head size."""
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return head_size * config.num_attention_heads


def keys_width(config: PreTrainedConfig) -> int:
    """Number of key-value heads times head size."""
    heads = config.num_attention_heads
    return attention_width(config) // heads * (getattr(config, "num_key_value_heads", None) or heads)


def linear_width(config: PreTrainedConfig) -> int:
    """Number of heads times the sizes of a key and a value, in layers of linear attention; 0 without such layers."""
    heads = getattr(config, "linear_num_value_heads", None) or 0
    return heads and heads * (config.linear_key_head_dim + config.linear_value_head_dim)


def linear_layers(config: PreTrainedConfig) -> int:
    """Number of layers whose attention is linear: it has no scores of T x T."""
    return (getattr(config, "layer_types", None) or []).count("linear_attention")


def hides_distant(config: PreTrainedConfig, length: int) -> bool:
    """Whether a token of a window of this length does not see all tokens before it, so that a kernel needs a mask."""
    window = getattr(config, "sliding_window", None)
    return isinstance(window, int) and length >= window


def _unknown(config: PreTrainedConfig) -> str:
    return f"{config.model_type} is not built as duorl.models.families says"


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 0
