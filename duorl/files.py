"""Writes files completely or not at all: first under another name, then renamed.

    with writing(folder / "table.csv") as beside:
        beside.write_text(...)

After a kill, the file is the old one or the new one. There may be a `.part-*` file or folder, which nothing reads, and
which goes when the run is resumed, or the folder is saved again.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

PART = ".part-"
"""Start of the names of incomplete files."""
_TEMPORARY, _LOCK = "duorl-", ".lock"
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
def writing_folder(folder: str | Path, *, last: str, stale: Iterable[str] = ()) -> Iterator[Path]:
    """A temporary folder in `folder`; at the end, what is in it takes the places of what has the same names.

    After an error, all is as it was. After a kill while files take their places, `last` is missing: a folder without it
    is incomplete.

    Args:
        folder: it is made if there is none.
        last: name of the file that goes first and comes last.
        stale: patterns of names; files of an earlier state that go, unless nothing is written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{PART}*"):
        if not _is_alive(left):
            _remove(left)
    with TemporaryDirectory(prefix=f"{PART}{os.getpid()}-", dir=folder) as place:
        new, old = Path(place, "new"), Path(place, "old")
        new.mkdir()
        old.mkdir()
        yield new
        coming = sorted((path.name for path in new.iterdir()), key=lambda name: name == last)
        known = {name for name in coming if os.path.lexists(folder / name)}
        known |= {path.name for pattern in stale if coming for path in folder.glob(pattern)}
        going = sorted(known, key=lambda name: name != last)
        _rename([*((folder / name, old / name) for name in going), *((new / name, folder / name) for name in coming)])


def _rename(steps: Sequence[tuple[Path, Path]]) -> None:
    """Rename one after the other; after an error, those that were renamed have their old names again."""
    try:
        for source, target in steps:
            os.replace(source, target)
    except BaseException:
        for source, target in reversed(steps):
            if not os.path.lexists(source):
                os.replace(target, source)
        raise


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A temporary folder, which goes at the end of the block; one of a killed process goes when the next one is made.

    A lock tells whether a folder is in use: the kernel removes it with the process.
    """
    for left in Path(gettempdir()).glob(f"{_TEMPORARY}*/{_LOCK}"):
        with suppress(OSError), left.open() as lock:  # it is of another user, in use, or gone meanwhile
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left.parent, ignore_errors=True)
    with TemporaryDirectory(prefix=_TEMPORARY, ignore_cleanup_errors=True) as name:
        place, new = Path(name, "work"), Path(name, "new")
        place.mkdir()
        with new.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
            new.rename(Path(name, _LOCK))  # only now others look whether it is in use
            yield place


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes have left in a folder and in the folders in it; no process may write there."""
    for place, folders, names in os.walk(folder):
        for name in (*folders, *names):
            if name.startswith(PART):
                _remove(Path(place, name))
        folders[:] = [name for name in folders if not name.startswith(PART)]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _is_alive(part: Path) -> bool:
    """Whether the process that writes an incomplete file or folder is there."""
    try:
        os.kill(int(part.name.removeprefix(PART).partition("-")[0]), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:  # it is another user's
        return True
    return True


def finished(folder: Path) -> Iterator[Path]:
    """All files in a folder and in the folders in it, without those that are being written."""
    for place, folders, names in os.walk(folder):  # it passes over what goes meanwhile
        folders[:] = sorted(name for name in folders if not name.startswith(PART))
        paths = (Path(place, name) for name in sorted(names) if not name.startswith(PART))
        yield from (path for path in paths if path.is_file())


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
