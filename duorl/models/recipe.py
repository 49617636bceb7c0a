"""The options of stage 1, known without what trains."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class PretrainOptions:
    """What stage 1 trains, and on what.

    Args:
        out: folder for the model, its tokenizer, checkpoints and TensorBoard events.
        corpus: built-in corpora, or paths and globs of .txt, .jsonl and .parquet files.
        model: folder of a model to go on from, with its tokenizer: a duo, or a Hugging Face causal language model,
            which is converted; its own networks become the big ones. Unless given, a model is built from `backbone`.
        backbone: a transformers configuration as a dictionary with `model_type`; its `dtype` is the precision the model
            is saved in, bfloat16 unless given. A model that stage 1 goes on from keeps its own.
        vocab_size: tokens of the byte-level BPE that is trained for a model built from `backbone`.
        small_ratio: inner size of the big network divided by that of the small one (the paper: 16).
        window: tokens to predict per window.
        skip_share: share of decisions that skip (the paper: 0).
        big_share: share of big among the others (the paper: 0.5); 1 trains a dense model, whose small networks stay
            as they are.
        trained: `all` weights, or only the `small` networks, beside a model that stays as it is (Duo-LLM, Fig. 8c).
        evaluation_windows: windows of the router split on which all-big and all-small are followed.
        training: options of transformers' TrainingArguments.
        seed: of initialisation, order of the text and routes.
    """

    out: str
    corpus: list[str] | str = field(default_factory=lambda: ["stdlib-code", "stdlib-docs"])
    model: str | None = None
    backbone: dict[str, Any] = field(default_factory=lambda: {"model_type": "llama"})
    vocab_size: int = 2048
    small_ratio: int = 16
    window: int = 256
    skip_share: float = 0.0
    big_share: float = 0.5
    trained: Literal["all", "small"] = "all"
    evaluation_windows: int = 64
    training: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("skip_share", "big_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], not {getattr(self, name)}")
        if self.trained == "small" and self.model is None:
            raise ValueError("trained 'small' leaves all else as it is: give the model to start from")
