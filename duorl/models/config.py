"""DuoConfig: what a duo model is built from."""

from __future__ import annotations

from typing import Any, Literal, get_args

from transformers import AutoConfig, PreTrainedConfig

# What the families call the inner size of their feed-forward network.
_INNER_SIZE_NAMES = ("intermediate_size", "n_inner", "ffn_hidden_size", "ffn_dim")


Skip = Literal["ffn", "block"]
"""What the action `skip` drops of a layer: the feed-forward network, or the attention's output as well."""


class DuoConfig(PreTrainedConfig):
    """A Hugging Face decoder's configuration and the inner size of the small networks beside its own.

    Args:
        backbone: the decoder's configuration, or its dictionary form with `model_type`.
        small_size: inner size of the small feed-forward network (the paper: big / 16).
        skip: what `skip` drops: `ffn`, or `block`, the attention's output as well. Attention runs either way, for the
            decision and later tokens read it, so both cost the same.
    """

    model_type = "duo"
    sub_configs = {"backbone": AutoConfig}  # noqa: RUF012  (transformers reads it off the class)

    def __init__(
        self,
        backbone: PreTrainedConfig | dict[str, Any] | None = None,
        small_size: int = 48,
        skip: Skip = "ffn",
        **kwargs,
    ):
        if backbone is None:
            backbone = {"model_type": "llama"}
        if isinstance(backbone, dict):
            fields = dict(backbone)
            backbone = AutoConfig.for_model(fields.pop("model_type"), **fields)
        self.backbone = backbone
        self.small_size = small_size
        self.skip = known_skip(skip)
        kwargs["tie_word_embeddings"] = getattr(backbone, "tie_word_embeddings", False)
        super().__init__(**kwargs)

    def get_text_config(self, decoder=None, encoder=None) -> PreTrainedConfig:
        """The decoder's configuration: generation sizes its caches by it."""
        return self.backbone

    @property
    def small_backbone(self) -> PreTrainedConfig:
        """The decoder's configuration with the small networks' inner size."""
        fields = self.backbone.to_dict()
        fields[inner_size_name(self.backbone)] = self.small_size
        return type(self.backbone).from_dict(fields)


def known_skip(skip: str) -> str:
    """`skip` itself.

    Raises:
        ValueError: it is not one of `Skip`.
    """
    if skip not in get_args(Skip):
        raise ValueError(f"skip drops {' or '.join(get_args(Skip))}, not {skip!r}")
    return skip


def inner_size_name(config: PreTrainedConfig) -> str:
    """The field that holds a decoder's FFN inner size.

    Raises:
        ValueError: none of the known names is there as a single number for all layers.
    """
    for name in _INNER_SIZE_NAMES:
        if hasattr(config, name) and not isinstance(getattr(config, name), list):
            return name
    raise ValueError(f"{config.model_type}: no single FFN inner size among {', '.join(_INNER_SIZE_NAMES)}")


def inner_size(config: PreTrainedConfig) -> int:
    """A decoder's FFN inner size; GPT-2 leaves it out and means four times the hidden size."""
    return getattr(config, inner_size_name(config)) or 4 * config.hidden_size
