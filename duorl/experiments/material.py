"""The input of commands: a model, its tokenizer, and text that fits both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from jsonargparse import Namespace
from transformers import PreTrainedTokenizerBase

from duorl.checks import require_positive
from duorl.corpus import Split, Windows, read_windows
from duorl.models import DuoForCausalLM, check_windows, load, load_tokenizer


class Material(NamedTuple):
    """A model, its tokenizer, and the length of windows."""

    model: DuoForCausalLM
    tokenizer: PreTrainedTokenizerBase
    window: int

    @classmethod
    def of(cls, options: Namespace, window: int) -> Material:
        """Load a model.

        Args:
            options: with `model`, `skip`, and those of `MapOptions`.
            window: tokens per window.

        Raises:
            ValueError, OSError: see `duorl.models.load`.
        """
        require_positive(window=window)
        model = load(options.model, skip=options.skip, **placed(options))
        return cls(model, load_tokenizer(options.model), window)

    def read(self, sources: str | Sequence[str], *, split: Split) -> Windows:
        """The windows of one split.

        Raises:
            ValueError, OSError: the text cannot be used, or not with this model; see `read_windows`, `check_windows`.
        """
        windows = read_windows(sources, self.tokenizer, split=split, length=self.window)
        check_windows(self.model, windows.tokens)
        return windows


def placed(options: Namespace) -> dict[str, Any]:
    """The arguments of `load` in `MapOptions`."""
    return {name: options[name] for name in ("device", "dtype", "device_map", "max_memory")}
