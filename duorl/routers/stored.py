"""Load a saved router; its files are checked first."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from duorl import hub
from duorl.extensions import not_from
from duorl.routers.base import Router, kind_of, rebuilt
from duorl.routers.fit import UnusableRouter, checked_record

_FILES = ("router.json", "router.safetensors", "README.md")


def load(folder: str | Path) -> Router:
    """Load a saved router.

    Args:
        folder: its folder, or `owner/name` or `owner/name@revision` on the hub.

    Raises:
        OSError: the folder holds no router, or its weights are missing, or the hub cannot be reached.
        ValueError: a file is broken, the class cannot be imported, or the weights do not fit the configuration or are
            not finite; the message names the file.
    """
    try:
        place = _found(folder)
        with not_from(place):
            return _loaded(place)
    except ValueError as error:
        raise UnusableRouter(str(error)) from error


def _found(folder: str | Path) -> Path:
    known = hub.remote_name(folder)
    return Path(folder) if known is None else hub.snapshot(known[0], _FILES, known[1])


def _loaded(folder: Path) -> Router:
    path, weights = folder / "router.json", folder / "router.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"no router in {folder}: {_what_is_there(folder)}")
    try:
        description = _description(path.read_bytes())
        state = _tensors(weights) if weights.is_file() else {}
        _require_plausible(description, state)
        router = rebuilt(description)
        router.trained_for = checked_record(description.get("model"))
        router.facts = _facts(description)
    except ValueError as error:
        raise ValueError(f"cannot load {path}: {error}") from error
    if router.state_dict():
        if not weights.is_file():
            raise FileNotFoundError(f"{folder} lacks router.safetensors")
        _require_same(weights, state, router.state_dict())
        router.load_state_dict(state)
        try:
            router.check()
        except ValueError as error:
            raise ValueError(f"{weights}: {error}") from error
    return router.eval()


def _what_is_there(folder: Path) -> str:
    """In words: the routers in a folder of a run, or in the folder in which it would be."""
    start = folder if folder.is_dir() else folder.parent
    found = [path.parent for depth in range(1, 4) for path in sorted(start.glob("*/" * depth + "router.json"))]
    if found:
        return f"there is one in {', '.join(map(str, found[:4]))}{', ...' if found[4:] else ''}"
    return "router.json is missing" if folder.is_dir() else "there is no such folder"


def _description(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object with `router` and `config`")
    return found


def _facts(description: dict[str, Any]) -> dict[str, Any] | None:
    facts = description.get("facts")
    if not isinstance(facts, dict | None):
        raise ValueError("its `facts` are no JSON object: remove them")
    return facts


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path.name} is broken ({error}): save the router anew") from error


def _require_plausible(description: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Refuse sizes that the weights do not have, before memory is allocated for them.

    Every size in the configuration of a built-in router divides the number of its weights.
    """
    kind, config = kind_of(description)
    if not kind.__module__.startswith("duorl.routers."):
        return
    most = sum(tensor.numel() for tensor in state.values())
    for name, size in _sizes(config):
        if most and size > most:
            raise ValueError(f"{name} is {size}, more than there are weights")
    if most:
        with torch.device("meta"):  # nothing is allocated
            try:
                expected = rebuilt(description).state_dict()
            except ValueError as error:
                if isinstance(error.__cause__, RuntimeError):  # it reads values, which do not exist here
                    return
                raise
        _require_same(Path("router.safetensors"), state, expected)


def _sizes(config: dict[str, Any]) -> Iterator[tuple[str, int]]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _sizes(value)
        elif isinstance(value, int) and name != "seed":
            yield name, value


def _require_same(path: Path, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Refuse weights with other names, shapes or dtypes than the router's, or that are not finite."""
    for name, tensor in expected.items():
        if name not in found:
            raise ValueError(f"{path} lacks {name}")
        if found[name].shape != tensor.shape or found[name].is_floating_point() != tensor.is_floating_point():
            said = [f"{each.dtype} {tuple(each.shape)}".removeprefix("torch.") for each in (found[name], tensor)]
            raise ValueError(f"{path}: {name} is {said[0]}, but router.json says {said[1]}")
        if not found[name].isfinite().all():
            raise ValueError(f"{path}: {name} holds numbers that are not finite")
    if more := sorted(found.keys() - expected.keys()):
        raise ValueError(f"{path}: {more[0]} is not among the weights of the router in router.json")
