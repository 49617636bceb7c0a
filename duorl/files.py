"""Files that are whole or not there: written beside their place, then renamed.

    with writing(folder / "table.csv") as beside:
        beside.write_text(...)

A process that is killed leaves the old file or the new one, and at worst a `.part-*` file that nothing reads.
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
"""How the names of files begin that are not whole yet."""
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """A path beside `path` to write to; at the end it takes the place of `path`, after an error it is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{PART}{os.getpid()}-{path.name}")  # the ending stays, for libraries choose formats by it
    try:
        yield beside
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with writing(path) as beside:
        beside.write_text(text, encoding="utf8")


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=1))


def is_no_room(error: BaseException) -> bool:
    """The error says that the disk, or one's share of it, is full."""
    if isinstance(error, OSError):
        return error.errno in _NO_ROOM
    # safetensors and torch write for themselves, and tell of it only in words.
    return any(sign in str(error) for sign in ("No space left", "code: 28", "file write failed", "quota exceeded"))
