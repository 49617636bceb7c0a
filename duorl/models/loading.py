"""Load a saved duo model, frozen.

transformers is imported only when a model is loaded, so a missing folder is found quickly.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from duorl.models.calls import Skip, known_skip

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from duorl.models.modeling import DuoForCausalLM

EMBEDDED = {"duo-tiny": Path(__file__).parent / "duo_tiny"}
_NEEDED = ("config.json", "model.safetensors|model.safetensors.index.json", "tokenizer.json")


def model_folder(name: str | Path) -> Path:
    """The folder of a model.

    Args:
        name: an embedded model's name (`EMBEDDED`), or a folder.

    Raises:
        FileNotFoundError: there is no such folder, or files are missing in it; the message names them.
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
    """Load a saved duo model, frozen and in evaluation mode.

    Args:
        name: `"duo-tiny"`, the model inside the package, or a folder.
        dtype: dtype of the weights in memory.
        skip: what the action `skip` leaves out, see `DuoConfig`; by default as the model was saved.

    Raises:
        FileNotFoundError: there is no such folder, or files are missing in it.
        ValueError: the folder holds another kind of model, or not all of its weights, or `skip` is unknown.
    """
    folder = model_folder(name)
    changed: dict[str, Any] = {} if skip is None else {"skip": known_skip(skip)}
    from duorl.models.config import DuoConfig
    from duorl.models.modeling import DuoForCausalLM

    kind = _settings(folder).get("model_type")
    if kind != DuoConfig.model_type:
        raise ValueError(f"{folder} holds a model of type {kind!r}, not a duo: make one with duorl.convert")
    try:
        loaded: Any = DuoForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True, **changed)
    except SafetensorError as problem:
        raise ValueError(f"cannot read the weights in {folder}: {problem}") from problem
    model, found = loaded
    if found["missing_keys"]:
        raise ValueError(f"the weights in {folder} lack {min(found['missing_keys'])}")
    return model.eval().requires_grad_(False)


def load_tokenizer(name: str | Path = "duo-tiny") -> PreTrainedTokenizerBase:
    """Load the tokenizer that was saved with a model; same arguments and errors as `load`."""
    folder = model_folder(name)
    from transformers import AutoTokenizer

    import duorl.models.config  # noqa: F401  (registers a duo's configuration, which transformers looks at)

    return AutoTokenizer.from_pretrained(folder)


def _settings(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "config.json").read_text())
    except ValueError as problem:
        raise ValueError(f"cannot read {folder / 'config.json'}: {problem}") from problem
