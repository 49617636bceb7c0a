"""DuoConfig: what a duo model is built from."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from duorl.models.calls import Skip, known_skip
from duorl.models.families import inner_size_name


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
            if not isinstance(fields.get("model_type"), str):
                raise ValueError("the configuration's backbone names no transformers family as model_type")
            backbone = AutoConfig.for_model(fields.pop("model_type"), **fields)
        if not isinstance(small_size, int) or small_size < 1:
            raise ValueError(f"small_size must be a number of at least 1, not {small_size!r}")
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


AutoConfig.register(DuoConfig.model_type, DuoConfig)
