"""Writes files completely or not at all: first under another name, then renamed.

    with writing(folder / "table.csv") as beside:
        beside.write_text(...)

After a kill, the file is the old one or the new one. There may be a `.part-*` file, which nothing reads.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
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


@contextmanager
def writing_folder(folder: str | Path, *, last: str) -> Iterator[Path]:
    """A temporary folder in `folder`; at the end, its files take the places of those with the same names.

    After an error, the old files are there. After a kill while files take their places, `last` is missing: a folder
    without it is incomplete.

    Args:
        folder: it is made if there is none.
        last: name of the file that goes first and comes last.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f"{PART}{os.getpid()}"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
        (folder / last).unlink(missing_ok=True)
        for path in sorted(beside.iterdir(), key=lambda path: path.name == last):
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


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
