"""What is found once for a model and a text, kept in a folder: `~/.cache/duorl`, or that of `DUORL_CACHE`.

    path = cached("baseline", model, windows, method="greedy", actions=("small", "big"))
    write_json(path, found)                     # the next run with the same weights, text and options reads it

A file that cannot be read is found anew; where nothing can be written, nothing is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from duorl.files import write_json
from duorl.models.modeling import DuoForCausalLM


def cache_folder() -> Path:
    """The folder of what is kept between runs."""
    if given := os.environ.get("DUORL_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "duorl"


def cached(kind: str, model: DuoForCausalLM, windows: Tensor, **options: Any) -> Path:
    """The file of what was found for a model, on windows (W, T+1), with options that are JSON values."""
    text = hashlib.sha256(windows.cpu().contiguous().numpy().tobytes()).hexdigest()
    facts = {"weights": fingerprint(model), "skip": model.config.skip, "text": text, "shape": list(windows.shape)}
    key = hashlib.sha256(json.dumps({**facts, **options}, sort_keys=True).encode()).hexdigest()
    return cache_folder() / f"{kind}-{key[:32]}.json"


def kept(path: Path) -> Any:
    """The JSON value of a file; None if there is none, or it is broken."""
    try:
        return json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError):
        return None


def keep(path: Path, value: Any) -> None:
    """Write a JSON value, if that is possible."""
    try:
        write_json(path, value)
    except OSError:  # a home that cannot be written, or a full disk: the next run searches again
        return


def fingerprint(model: nn.Module) -> str:
    """A hash of all weights, with their names, precision and kind of device; also of those on the disk."""
    from accelerate.utils import align_module_device

    found = hashlib.sha256()
    for name, module in model.named_modules():
        if not (own := [key for key, _ in module.named_parameters(recurse=False)]):
            continue
        with align_module_device(module):
            for key in own:
                weight = module.get_parameter(key).detach()
                found.update(f"{name}.{key} {weight.dtype} {tuple(weight.shape)} {weight.device.type}".encode())
                found.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
