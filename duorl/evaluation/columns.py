"""Tensors by name with one row per window: as a file, and the rows of several files joined.

save_columns({"losses": losses}, folder / "0.safetensors")
losses = joined_columns([folder / "0.safetensors", folder / "1.safetensors"])["losses"]
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from duorl.files import writing

Columns = dict[str, Tensor]
"""Tensors (B, ...) of B windows."""


def save_columns(columns: Columns, path: Path) -> None:
    """Write a safetensors file, completely or not at all."""
    with writing(path) as beside:
        save_file({name: values.contiguous() for name, values in columns.items()}, beside)


def joined_columns(paths: Sequence[Path]) -> Columns:
    """The windows of several files with the same columns, one after the other."""
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in paths]
        return {name: _joined([file.get_slice(name) for file in files]) for name in files[0].keys()}  # noqa: SIM118


def _joined(parts: Sequence[Any]) -> Tensor:
    """The rows of slices, read one by one: there is no second table beside the joined one."""
    rows = (part[row] for part in parts for row in range(part.get_shape()[0]))
    first = next(rows)
    found = first.new_empty(sum(part.get_shape()[0] for part in parts), *first.shape)
    found[0] = first
    for place, values in enumerate(rows, start=1):
        found[place] = values
    return found
