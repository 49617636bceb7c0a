"""DuoConfig: the configuration of a duo model."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from duorl.models.calls import Skip, known_skip
from duorl.models.families import inner_size_name


class DuoConfig(PreTrainedConfig):
    """Configuration of a Hugging Face decoder, and the inner size of the small networks.

    Args:
        backbone: the decoder's configuration, or its dictionary form with `model_type`.
        small_size: inner size of the small feed-forward network (the paper: big / 16).
        skip: what `skip` leaves out: `ffn`, or `block`, which is also the attention's output. Attention runs in both
            cases, because the decision and later tokens need it. So both have the same compute.
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
        """The decoder's configuration; generation reads the sizes of its caches from it."""
        return self.backbone

    @property
    def small_backbone(self) -> PreTrainedConfig:
        """The decoder's configuration with the small networks' inner size."""
        fields = self.backbone.to_dict()
        fields[inner_size_name(self.backbone)] = self.small_size
        return type(self.backbone).from_dict(fields)


AutoConfig.register(DuoConfig.model_type, DuoConfig)
