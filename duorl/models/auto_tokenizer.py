"""Small networks have the tokenizer of their base model, also for AutoTokenizer and pipelines of transformers.

import duorl
tokenizer = transformers.AutoTokenizer.from_pretrained("small")
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from duorl import hub
from duorl.models.bases import find_recorded, read_object
from duorl.models.config import DuoConfig
from duorl.models.gateway import load_fast_tokenizer

_OF_SMALL = ("revision", "subfolder", "_from_auto", "_from_pipeline", "_commit_hash", *hub.OPTIONS)


class DuoTokenizer:
    """What AutoTokenizer asks for a duo's tokenizer, where the folder does not name its class."""

    @classmethod
    def from_pretrained(cls, name: str | Path, *args: Any, **kwargs: Any) -> PreTrainedTokenizerBase:
        """The tokenizer in the folder, or that of the base model of small networks.

        Args:
            name: a folder, or `owner/name` on the hub.
            args, kwargs: as in transformers; options of the hub are for the small networks and their base model.

        Raises:
            OSError, ValueError: see `find_recorded` and `Base.tokenizer`.
        """
        with hub.using(**{option: kwargs[option] for option in hub.OPTIONS if option in kwargs}):
            config = _config_file(name, kwargs.get("revision"), kwargs.get("subfolder"))
            base = read_object(config).get("base")
            if base is None or config.with_name("tokenizer.json").is_file():
                return load_fast_tokenizer(name, *args, **kwargs)
            more = {option: value for option, value in kwargs.items() if option not in _OF_SMALL}
            return find_recorded(base, config).tokenizer(**more)


def _config_file(name: str | Path, revision: str | None, inside: str | None) -> Path:
    file = f"{inside}/config.json" if inside else "config.json"
    return Path(name) / file if Path(name).is_dir() else hub.fetch(str(name), file, revision)


AutoTokenizer.register(DuoConfig, DuoTokenizer)
