"""The options of stage 1, in a module that imports no training code."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from duorl.checks import require_positive
from duorl.paths import BasePath, TextPath

_LEAST_VOCABULARY = 257


@dataclass(frozen=True)
class PretrainOptions:
    """Stage 1: train a duo model under random routing.

    Args:
        out: folder for the model, its tokenizer, checkpoints and TensorBoard events.
        corpus: built-in corpora, or paths and globs of .txt, .jsonl and .parquet files.
        model: folder of a model to start from, with its tokenizer: a duo, or a Hugging Face causal language model. This
            is converted, and its networks become the big ones. By default, a model is built from `backbone`.
        backbone: a transformers configuration as a dictionary with `model_type`. Its `dtype` is the precision of the
            saved model, by default bfloat16. A model from a folder keeps its precision.
        vocab_size: number of tokens of the byte-level BPE for a model built from `backbone`.
        small_ratio: inner size of the big network divided by that of the small one (the paper: 16).
        window: tokens to predict per window.
        skip_share: share of decisions that skip (the paper: 0).
        big_share: share of big in the other decisions (the paper: 0.5); 1 trains a dense model, and the small networks
            do not change.
        trained: `all` weights, or only those of the `small` networks (Duo-LLM, Fig. 8c).
        evaluation_windows: windows of the router split for the losses of all-big and all-small during the training.
        training: options of TrainingArguments of transformers.
        seed: seed of initial weights, order of the text and routes.
    """

    out: str
    corpus: list[TextPath] | TextPath = field(default_factory=lambda: ["stdlib-code", "stdlib-docs"])
    model: BasePath | None = None
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
        counts = ("small_ratio", "window", "evaluation_windows")
        require_positive(**{name: getattr(self, name) for name in counts})
        if self.vocab_size < _LEAST_VOCABULARY:
            least = f"at least {_LEAST_VOCABULARY}, the 256 bytes and the end of text"
            raise ValueError(f"vocab_size must be {least}, not {self.vocab_size}")
        for name in ("skip_share", "big_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], not {getattr(self, name)}")
        if self.trained == "small" and self.model is None:
            raise ValueError("trained 'small' changes nothing else: give the model to start from")
