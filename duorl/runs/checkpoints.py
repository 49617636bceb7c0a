"""Checkpoints: a learner's state as one safetensors file, exact and without pickle.

    save(path, {"weights": tensor, "step": 7, "random": generator.bit_generator.state})
    state = load(path)

The file has the tensors. The structure around them is JSON in the file's metadata, and so is the version of DuoRL. A
digest of all is there too, because a disk may change bytes that no reader of safetensors looks at.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save as serialized

from duorl.files import writing
from duorl.version import VERSION

_STRUCTURE, _DIGEST, _VERSION = "state", "sha256", "duorl"


def save(path: str | Path, state: Any) -> None:
    """Write a state, completely or not at all.

    Args:
        path: path of the file.
        state: dictionaries (keys: strings, numbers, tuples), lists, tuples, numbers, booleans, None and strings, with
            torch tensors and NumPy arrays in them. An object of a subclass is loaded as an object of the base class.

    Raises:
        TypeError: the state has an object of another type; the message says where.
        OSError: the file cannot be written.
    """
    tensors: dict[str, torch.Tensor] = {}
    structure = json.dumps(_encoded(state, "state", tensors), allow_nan=False)
    kept = {_STRUCTURE: structure, _VERSION: VERSION}
    with writing(path) as beside:
        beside.write_bytes(serialized(tensors, {**kept, _DIGEST: _digest(structure + VERSION, tensors)}))


def load(path: str | Path) -> Any:
    """Load a saved state; its tensors are on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is broken or not a checkpoint; the message names it.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            structure, digest = (file.metadata()[name] for name in (_STRUCTURE, _DIGEST))
            version = file.metadata().get(_VERSION, "")  # releases before 0.3 did not keep theirs
        if _digest(structure + version, tensors) != digest:
            raise ValueError("its content is not what was saved")
        return _decoded(json.loads(structure), tensors)
    except Exception as error:  # what a broken structure leads to is of many kinds
        raise ValueError(f"{path} is broken or not a checkpoint: delete it to start anew ({error})") from error


def version(path: str | Path) -> str:
    """The version of DuoRL that saved a checkpoint; empty before 0.3."""
    with safe_open(path, "pt") as file:
        return file.metadata().get(_VERSION, "")


def _digest(structure: str, tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of everything that a file holds."""
    found = hashlib.sha256(structure.encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _encoded(value: Any, where: str, tensors: dict[str, torch.Tensor]) -> Any:
    """JSON for a value: the value, a list, or a dictionary with its type as the only key. Tensors go to `tensors`."""
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, torch.Tensor):
        return {"tensor": _put(value.detach().cpu().contiguous().clone(), tensors)}
    if isinstance(value, (np.ndarray, np.generic)):
        return {"array": _encoded_array(np.asarray(value), where, tensors), "scalar": isinstance(value, np.generic)}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": repr(float(value))}
    if isinstance(value, dict):
        pairs = [(_encoded(key, where, tensors), _encoded(value[key], f"{where}[{key!r}]", tensors)) for key in value]
        return {"dict": pairs}
    if isinstance(value, (list, tuple)):
        items = [_encoded(item, f"{where}[{index}]", tensors) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, (int, str)):
        return int(value) if isinstance(value, int) else str(value)
    raise TypeError(f"{where} is a {type(value).__name__}, which a checkpoint cannot hold")


def _encoded_array(array: np.ndarray, where: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The bytes of an array as a tensor, because torch lacks some types of NumPy."""
    if array.dtype.hasobject:
        raise TypeError(f"{where} is an array of objects, which a checkpoint cannot hold")
    content = torch.from_numpy(np.frombuffer(array.tobytes(), np.uint8).copy())
    return {"bytes": _put(content, tensors), "type": array.dtype.str, "shape": list(array.shape)}


def _put(tensor: torch.Tensor, tensors: dict[str, torch.Tensor]) -> str:
    name = str(len(tensors))
    tensors[name] = tensor
    return name


def _decoded(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_decoded(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    kind, content = next(iter(value.items()))
    if kind == "tensor":
        return tensors[content]
    if kind == "array":
        kept = tensors[content["bytes"]].numpy().tobytes()
        array = np.frombuffer(kept, np.dtype(content["type"])).reshape(content["shape"]).copy()
        return array[()] if value["scalar"] else array
    if kind == "float":
        return float(content)
    if kind == "dict":
        return {_decoded(key, tensors): _decoded(item, tensors) for key, item in content}
    return tuple(_decoded(item, tensors) for item in content)
