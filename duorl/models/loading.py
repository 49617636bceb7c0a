"""Load a saved duo model, frozen.

transformers is imported only when a model is loaded, so a missing folder is found quickly.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from duorl.devices import Dtype, pick_device, pick_dtype, require_memory
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
    name: str | Path = "duo-tiny",
    *,
    dtype: torch.dtype | Dtype = torch.float32,
    device: torch.device | str = "cpu",
    skip: Skip | None = None,
) -> DuoForCausalLM:
    """Load a saved duo model, frozen and in evaluation mode.

    Args:
        name: `"duo-tiny"`, the model inside the package, or a folder.
        dtype: dtype of the weights in memory, or its name; see `duorl.devices` for `auto`.
        device: where the model runs; see `duorl.devices`.
        skip: what the action `skip` leaves out, see `DuoConfig`; by default as the model was saved.

    Raises:
        FileNotFoundError: there is no such folder, or files are missing in it.
        ValueError: the folder holds another kind of model, or not all of its weights, or `skip` is unknown, or the
            device is not there, or the weights do not fit into memory.
    """
    folder = model_folder(name)
    changed: dict[str, Any] = {} if skip is None else {"skip": known_skip(skip)}
    from duorl.models.config import DuoConfig
    from duorl.models.modeling import DuoForCausalLM

    settings = _settings(folder)
    kind = settings.get("model_type")
    if kind != DuoConfig.model_type:
        raise ValueError(f"{folder} holds a model of type {kind!r}, not a duo: make one with duorl.convert")
    _require_plausible(folder, settings)
    place = pick_device(str(device))
    dtype = _fitting(folder, settings, place, dtype)
    try:
        with _without_report():
            changed |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # all is looked at below
            loaded: Any = DuoForCausalLM.from_pretrained(folder, dtype=dtype, **changed)
    except SafetensorError as problem:
        raise ValueError(f"cannot read the weights in {folder}: {problem}") from problem
    except Exception as problem:  # whatever a broken config.json or a shard that is missing leads to in transformers
        raise ValueError(f"cannot load the model in {folder}: {_said(problem)}") from problem
    model, found = loaded
    _check_weights(folder, model, found)
    return model.to(place).eval().requires_grad_(False)


def _fitting(folder: Path, settings: dict[str, Any], place: torch.device, dtype: torch.dtype | Dtype) -> torch.dtype:
    """The precision of a name; refuses weights that do not fit into memory in it."""
    from duorl.models.config import DuoConfig
    from duorl.models.footprint import weight_bytes

    try:
        config = DuoConfig.from_dict(dict(settings))
        found = pick_dtype(dtype, place, config.backbone.hidden_size) if isinstance(dtype, str) else dtype
        needed = weight_bytes(config, found)
    except Exception as problem:  # whatever a broken config.json leads to
        raise ValueError(f"cannot load the model in {folder}: {_said(problem)}") from problem
    require_memory(needed, place, f"the weights in {folder}", "give another --dtype or a smaller model")
    return found


def _require_plausible(folder: Path, settings: dict[str, Any]) -> None:
    """Find a number of layers that the weights do not have before so many are made."""
    backbone = settings.get("backbone")
    if not isinstance(backbone, dict):
        raise ValueError(f"{folder / 'config.json'} has no object `backbone`, the decoder's own configuration")
    weights = folder / "model.safetensors"
    if not weights.is_file():
        return  # in several files, which transformers checks one by one
    try:
        with safe_open(weights, "pt") as file:
            count = len(file.keys())
    except SafetensorError as problem:
        raise ValueError(f"cannot read the weights in {folder}: {problem}") from problem
    for name, value in backbone.items():
        if "layer" in name and isinstance(value, int) and value > count:
            raise ValueError(f"{folder / 'config.json'}: {name} is {value}, but the weights are {count} tensors")


@contextmanager
def _without_report() -> Iterator[None]:
    """transformers tells in a table which weights it lacks; here it is an error, in one line."""
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_is_error)  # a higher level of this logger would make transformers report on sharding
    try:
        yield
    finally:
        logger.removeFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _check_weights(folder: Path, model: DuoForCausalLM, found: Mapping[str, Any]) -> None:
    """Refuse weights that are not the model's, or no numbers."""
    if found["mismatched_keys"]:
        name, kept, expected = min(found["mismatched_keys"])
        sizes = f"{tuple(kept)} and not {tuple(expected)}"
        raise ValueError(f"the weights in {folder}: {name} has shape {sizes}, which config.json says")
    if found["missing_keys"]:
        raise ValueError(f"the weights in {folder} lack {min(found['missing_keys'])}")
    if found["unexpected_keys"]:
        more = min(found["unexpected_keys"])
        raise ValueError(f"the weights in {folder} hold {more}, which the model of its config.json does not have")
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise ValueError(f"the weights in {folder}: {name} holds numbers that are not finite")


def _said(problem: Exception) -> str:
    """An error of a library in one line: its class, where the words alone say little."""
    words = " ".join(str(problem).split())
    return words if isinstance(problem, ValueError | OSError) else f"{type(problem).__name__}: {words}"


def load_tokenizer(name: str | Path = "duo-tiny") -> PreTrainedTokenizerBase:
    """Load the tokenizer that was saved with a model; same arguments and errors as `load`."""
    folder = model_folder(name)
    from transformers import AutoTokenizer

    import duorl.models.config  # noqa: F401  (registers a duo's configuration, which transformers looks at)

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as problem:  # the tokenizers library raises bare exceptions
        raise ValueError(f"cannot load the tokenizer in {folder}: {_said(problem)}") from problem
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer in {folder} has no end-of-text token, which stands between texts: name one")
    return tokenizer


def check_windows(model: DuoForCausalLM, windows: Tensor) -> None:
    """Refuse windows (W, T+1) that a model cannot read.

    Raises:
        ValueError: they are longer than the model's positions, or hold tokens that it does not know.
    """
    if windows.ndim != 2 or windows.shape[1] < 2 or windows.is_floating_point():
        raise ValueError(f"windows are token ids of shape (W, T+1), not {windows.dtype} {tuple(windows.shape)}")
    config, length = model.config.backbone, windows.shape[1] - 1
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and length > most:
        raise ValueError(f"a window of {length} tokens is longer than the model's {most} positions: give a smaller one")
    unknown = (windows < 0) | (windows >= config.vocab_size)
    if unknown.any():
        raise ValueError(
            f"the text holds token {windows[unknown][0].item()}, but the model knows 0 to {config.vocab_size - 1}: "
            "give it its own tokenizer"
        )


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf8"))
    except (ValueError, RecursionError) as problem:
        raise ValueError(f"cannot read {path}: {problem}") from problem
    if not isinstance(settings, dict):
        raise ValueError(f"cannot read {path}: it holds no JSON object")
    return settings
