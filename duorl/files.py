"""Writes files completely or not at all: first under another name, then renamed.

    with writing(folder / "table.csv") as beside:
        beside.write_text(...)

After a kill, the file is the old one or the new one. There may be a `.part-*` file, which nothing reads.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PART = ".part-"
"""Start of the names of incomplete files."""
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`. At the end it is renamed to `path`; after an error it is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{PART}{os.getpid()}-{path.name}")  # keeps the suffix, which gives the format
    try:
        yield beside
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, completely or not at all."""
    with writing(path) as beside:
        beside.write_text(text, encoding="utf8")


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as JSON, completely or not at all."""
    write_text(path, json.dumps(value, indent=1))


def is_no_room(error: BaseException) -> bool:
    """Whether an error says that the disk or the quota is full."""
    if isinstance(error, OSError):
        return error.errno in _NO_ROOM
    # safetensors and torch raise errors of their own; only the message says that the disk is full.
    return any(sign in str(error) for sign in ("No space left", "code: 28", "file write failed", "quota exceeded"))
