"""DuoConfig: the configuration of a duo model."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from duorl.models.calls import Skip, known_skip
from duorl.models.families import family_of, inner_size_name


class DuoConfig(PreTrainedConfig):
    """Configuration of a Hugging Face decoder, and the inner size of the small networks.

    Settings of the decoder, for example `vocab_size` and `hidden_size`, are read from and written to `backbone`.

    Args:
        backbone: the decoder's configuration, or its dictionary form with `model_type`.
        small_size: inner size of the small feed-forward network (the paper: big / 16).
        skip: what `skip` leaves out: `ffn`, or `block`, which is also the attention's output. Attention runs in both
            cases, because the decision and later tokens need it. So both have the same compute.
        base: in a folder of small networks alone, their base model: its `name` and `revision`, and the `fingerprint`
            of its big networks (`duorl.models.shared`).
        price: nats per all-big pass that commands take if no price is given; None: theirs.
    """

    model_type = "duo"
    sub_configs = {"backbone": AutoConfig}  # noqa: RUF012  (transformers reads it off the class)
    tokenizer_class = None  # the decoder's may name one; a folder of small networks has no files for it

    def __init__(
        self,
        backbone: PreTrainedConfig | dict[str, Any] | None = None,
        small_size: int = 48,
        skip: Skip = "ffn",
        base: dict[str, str | None] | None = None,
        price: float | None = None,
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
        own = vars(PreTrainedConfig())
        theirs = {name: kwargs.pop(name) for name in list(kwargs) if hasattr(backbone, name) and name not in own}
        kwargs["tie_word_embeddings"] = getattr(backbone, "tie_word_embeddings", False)
        super().__init__(**kwargs)
        self.small_size = small_size
        self.skip = known_skip(skip)
        self.base = base
        self.price = price
        self.backbone = backbone
        for name, value in theirs.items():
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        """A setting of the decoder, if this configuration does not have it."""
        backbone = self.__dict__.get("backbone")
        if backbone is None or name.startswith("_"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(backbone, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a setting; those that only the decoder has are set there."""
        backbone = self.__dict__.get("backbone")
        own = backbone is None or name in self.__dict__ or hasattr(type(self), name) or not hasattr(backbone, name)
        super().__setattr__(name, value) if own else setattr(backbone, name, value)

    def get_text_config(self, decoder=None, encoder=None) -> PreTrainedConfig:
        """The decoder's configuration; generation reads the sizes of its caches from it."""
        return self.__dict__.get("backbone", self)

    @property
    def small_backbone(self) -> PreTrainedConfig:
        """The decoder's configuration with the small networks' inner size, if the family has a field for it."""
        fields = self.backbone.to_dict()
        if family_of(self.backbone).inner_size is not None:
            fields[inner_size_name(self.backbone)] = self.small_size
        return type(self.backbone).from_dict(fields)


AutoConfig.register(DuoConfig.model_type, DuoConfig)
