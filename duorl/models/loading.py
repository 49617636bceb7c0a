"""Loading a saved duo model, frozen, and checking that a model is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from duorl.models.config import DuoConfig, Skip, known_skip
from duorl.models.modeling import DuoForCausalLM

EMBEDDED = {"duo-tiny": Path(__file__).parent / "duo_tiny"}
_NEEDED = ("config.json", "model.safetensors|model.safetensors.index.json", "tokenizer.json")


def model_folder(name: str | Path) -> Path:
    """The folder of a model.

    Args:
        name: an embedded model's name (`EMBEDDED`), or a folder.

    Raises:
        FileNotFoundError: there is no such folder, or files are missing in it; names them.
    """
    folder = EMBEDDED.get(str(name), Path(name))
    if not folder.is_dir():
        raise FileNotFoundError(f"no model {str(name)!r}: give a folder, or one of {', '.join(EMBEDDED)}")
    missing = [names for names in _NEEDED if not any((folder / name).exists() for name in names.split("|"))]
    if missing:
        raise FileNotFoundError(f"model folder {folder} lacks {', '.join(n.split('|')[0] for n in missing)}")
    return folder


def load(
    name: str | Path = "duo-tiny", *, dtype: torch.dtype = torch.float32, skip: Skip | None = None
) -> DuoForCausalLM:
    """A saved duo model, frozen and in evaluation mode.

    Args:
        name: `"duo-tiny"`, the model inside the package, or a folder.
        dtype: of the weights in memory.
        skip: what the action `skip` drops, see `DuoConfig`; as the model was saved unless given.

    Raises:
        FileNotFoundError: there is no such folder, or files are missing in it.
        ValueError: the folder holds another kind of model, or not all of its weights, or `skip` is unknown.
    """
    folder = model_folder(name)
    kind = json.loads((folder / "config.json").read_text()).get("model_type")
    if kind != DuoConfig.model_type:
        raise ValueError(f"{folder} holds a model of type {kind!r}, not a duo: make one with duorl.convert")
    changed: dict[str, Any] = {} if skip is None else {"skip": known_skip(skip)}
    loaded: Any = DuoForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True, **changed)
    model, found = loaded
    if found["missing_keys"]:
        raise ValueError(f"the weights in {folder} lack {min(found['missing_keys'])}")
    return model.eval().requires_grad_(False)


def load_tokenizer(name: str | Path = "duo-tiny") -> PreTrainedTokenizerBase:
    """The tokenizer that was saved with a model; the same arguments and errors as `load`."""
    return AutoTokenizer.from_pretrained(model_folder(name))


def require_frozen(model: nn.Module) -> None:
    """Refuse a model that would be trained along.

    Raises:
        ValueError: a parameter is trainable; names the first.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            raise ValueError(f"the model must be frozen, but {name} is trainable: call model.requires_grad_(False)")
