"""The options of a conversion with trained small networks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from duorl.checks import require_positive
from duorl.closeness import Target
from duorl.paths import BasePath, TextPath

Stage = Literal["choose", "regress", "distil"]
STAGES: tuple[Stage, ...] = get_args(Stage)


def _check_updates(tokens: int, tokens_per_update: int, learning_rate: float) -> None:
    require_positive(tokens=tokens, tokens_per_update=tokens_per_update)
    if not learning_rate > 0:
        raise ValueError(f"learning_rate must be above 0, not {learning_rate}")


@dataclass(frozen=True)
class ChooseOptions:
    """Stage 1: the most useful neurons of big.

    Args:
        tokens: tokens to record; each is read twice.
    """

    tokens: int = 16_384

    def __post_init__(self) -> None:
        require_positive(tokens=self.tokens)


@dataclass(frozen=True)
class RegressOptions:
    """Stage 2: every small network learns the outputs of its big one on big's own inputs.

    Args:
        tokens: tokens to learn from.
        tokens_per_update: tokens per update of the weights.
        learning_rate: of AdamW, at its highest.
    """

    tokens: int = 100_000
    tokens_per_update: int = 2_048
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        _check_updates(self.tokens, self.tokens_per_update, self.learning_rate)


@dataclass(frozen=True)
class DistilOptions:
    """Stage 3: all small networks together, under random routing.

    Args:
        tokens: tokens to learn from.
        tokens_per_update: tokens per update of the weights.
        learning_rate: of AdamW, at its highest.
        target: `teacher` comes closer to the all-big distribution, `text` to the next token of the text.
    """

    tokens: int = 200_000
    tokens_per_update: int = 512
    learning_rate: float = 1e-3
    target: Target = "teacher"

    def __post_init__(self) -> None:
        _check_updates(self.tokens, self.tokens_per_update, self.learning_rate)


@dataclass(frozen=True)
class ConvertOptions:
    """Make a duo model from a language model: its own networks become the big ones, small ones are made.

    Args:
        model: a model of the hub (`owner/name`), a folder, a .gguf file, or `smollm2`, the model in the package of the
            extra `smollm2`.
        out: folder for the small networks, their card and TensorBoard events.
        corpus: built-in corpora, or paths and globs of .txt, .jsonl and .parquet files. Small networks learn on the
            split `model`.
        small_ratio: inner size of the big network divided by that of the small one (the paper: 16).
        window: tokens to predict per window.
        until: the last stage.
        choose: options of stage 1.
        regress: options of stage 2.
        distil: options of stage 3.
        evaluation_windows: windows of the router split for the losses during the stages.
        seed: seed of the order of the text and of routes.
    """

    model: BasePath
    out: str
    corpus: list[TextPath] | TextPath = field(default_factory=lambda: ["stdlib-code", "stdlib-docs"])
    small_ratio: int = 16
    window: int = 256
    until: Stage = "distil"
    choose: ChooseOptions = field(default_factory=ChooseOptions)
    regress: RegressOptions = field(default_factory=RegressOptions)
    distil: DistilOptions = field(default_factory=DistilOptions)
    evaluation_windows: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("small_ratio", "window", "evaluation_windows")
        require_positive(**{name: getattr(self, name) for name in counts})

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages up to the last one that is wanted."""
        return STAGES[: STAGES.index(self.until) + 1]
