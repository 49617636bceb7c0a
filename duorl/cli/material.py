"""The input of commands: a model, its tokenizer, and text that fits both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from duorl.checks import require_positive
from duorl.corpus import Split, Windows, read_windows
from duorl.models import DuoForCausalLM, check_windows, load, load_tokenizer
from duorl.models.calls import Skip


class Material(NamedTuple):
    """A model, its tokenizer, and the length of windows."""

    model: DuoForCausalLM
    tokenizer: PreTrainedTokenizerBase
    window: int

    @classmethod
    def of(cls, model: str, skip: Skip | None, window: int) -> Material:
        """Load a model.

        Raises:
            ValueError, OSError: see `duorl.models.load`.
        """
        require_positive(window=window)
        return cls(load(model, skip=skip), load_tokenizer(model), window)

    def read(self, sources: str | Sequence[str], *, split: Split) -> Windows:
        """The windows of one split.

        Raises:
            ValueError, OSError: the text cannot be used, or not with this model; see `read_windows`, `check_windows`.
        """
        windows = read_windows(sources, self.tokenizer, split=split, length=self.window)
        check_windows(self.model, windows.tokens)
        return windows
