"""The folder of a run: its lock and its configuration.

    with claim("runs/mine", "train", config, resume=False, overwrite=False) as folder:
        ...

The folder of a run has a file `.duorl`. The process that works in the folder has a lock on this file. The kernel
removes the lock when the process ends, also after a kill. If a folder has only `.duorl`, the process ended before it
wrote `config.yaml`, and the folder can be used again. `.duorl` has the versions of DuoRL that worked in the folder.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from duorl.files import PART, remove_unfinished, write_text
from duorl.version import VERSION

MARK, CONFIG = ".duorl", "config.yaml"
_OF_A_CALL = {"resume", "overwrite", "out", "config"}
_FREE = {"save_every", "processes", "cluster", "threads", "until", "whole", "windows"}
"""Options of a run that may change on resume: they say how it works and where it ends, not what it makes."""


def check(out: str | None, *, resume: bool = False, overwrite: bool = False) -> None:
    """Refuse an output folder that a run cannot use; nothing is written.

    Args:
        out: the folder; None for a free one.
        resume: continue the run in it.
        overwrite: replace the run in it.

    Raises:
        FileExistsError: the folder has files and neither `overwrite` nor `resume` is set, or the files are not a run,
            or another process works in it.
        FileNotFoundError: there is nothing to resume.
        PermissionError: the folder cannot be written.
    """
    folder = Path(out) if out is not None else None
    if resume and overwrite:
        raise ValueError("--resume continues the run that --overwrite would delete: give one of them")
    if resume and (folder is None or not folder.is_dir()):
        raise FileNotFoundError(f"nothing to resume: --out {folder} holds no run")
    _check_writable(folder or Path("runs"))
    if folder is None or not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: give another --out")
    if (folder / MARK).is_file():
        os.close(_lock(folder))  # first, so that the message never advises to overwrite the folder of a running process
    _check_content(folder, resume, overwrite)


def _check_content(folder: Path, resume: bool, overwrite: bool) -> None:
    names = {path.name for path in folder.iterdir() if not path.name.startswith(PART)}
    if names <= {MARK}:
        return
    if not (resume or overwrite):
        raise FileExistsError(f"{folder} already holds files: give --overwrite to replace a run, or another --out")
    if MARK not in names:
        raise FileExistsError(f"{folder} holds files but no run (no {MARK}): give another --out")
    if resume and CONFIG not in names:
        raise FileNotFoundError(f"nothing to resume: {folder} has no {CONFIG}; give --overwrite to start again there")
    if Path.cwd().is_relative_to(folder.resolve()):
        raise FileExistsError(f"{folder} is the current folder: give another --out")


def _check_writable(folder: Path) -> None:
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if there.is_dir() and not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"no permission to write in {there}: give another --out")


def check_same_options(out: str, config: str, reread: Callable[[Path], str] | None = None) -> None:
    """Refuse to resume a run with other options, because different routers would be in one table.

    Args:
        out: the folder of the run.
        config: the complete options as YAML.
        reread: reads the options that the run was made with, and adds those that are newer than the run, with their
            defaults; by default nothing is added.

    Raises:
        ValueError: an option differs; the message names the first one.
    """
    path = Path(out) / CONFIG
    if not path.is_file():
        return
    try:
        kept = reread(path) if reread else path.read_text(encoding="utf8")
        now, then = (dict(flatten(yaml.safe_load(text))) for text in (config, kept))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read {path}: {error}: give --overwrite to begin anew") from error
    for name in sorted(now.keys() | then.keys()):
        if name not in _OF_A_CALL | _FREE and now.get(name) != then.get(name):
            raise ValueError(f"{out} was made with {name} {then.get(name)}, not {now.get(name)}: cannot resume it")


def versions(folder: str | Path) -> list[str]:
    """The versions of DuoRL that worked in a run's folder, the first one first; none for runs before 0.3."""
    mark = Path(folder) / MARK
    return mark.read_text(encoding="utf8").split("\n")[:-1] if mark.is_file() else []


@contextmanager
def claim(out: str | None, name: str, config: str, *, resume: bool = False, overwrite: bool = False) -> Iterator[Path]:
    """Make or empty the folder of a run, lock it for this process, and write the configuration.

    Args:
        out: the folder; None for the first free `runs/NAME-N`.
        name: NAME in `runs/NAME-N`.
        config: the complete options as YAML.
        resume: continue the run in it; of its configuration, only the options in `_FREE` change.
        overwrite: replace the run in it.

    Raises:
        FileExistsError: another process works in it; otherwise as `check`.
    """
    folder = _free(name) if out is None else Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    if out is not None and not (folder / MARK).is_file():
        _check_content(folder, resume, overwrite)  # before the lock creates its file there
    lock = _lock(folder)
    try:
        _check_content(folder, resume, overwrite)  # another process may have worked here before this one got the lock
        if resume and (folder / CONFIG).is_file():
            remove_unfinished(folder)
            _take_changes(folder / CONFIG, config)
        else:
            _empty(folder)
            os.ftruncate(lock, 0)
            write_text(folder / CONFIG, config)
        if versions(folder)[-1:] != [VERSION]:
            os.pwrite(lock, f"{VERSION}\n".encode(), os.fstat(lock).st_size)
        yield folder
    finally:
        os.close(lock)


def _take_changes(path: Path, config: str) -> None:
    now, then = yaml.safe_load(config), yaml.safe_load(path.read_text(encoding="utf8"))
    changed = {name: now[name] for name in _FREE & now.keys() if now[name] != then.get(name)}
    if changed:
        write_text(path, yaml.safe_dump({**then, **changed}, sort_keys=False))


def abandon(folder: Path) -> None:
    """Empty the folder of a failed run, so that another run can use it."""
    _empty(folder)


def _free(name: str) -> Path:
    for number in count(1):
        folder = Path("runs") / f"{name}-{number}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
    raise AssertionError("unreachable")


def _lock(folder: Path) -> int:
    descriptor = os.open(folder / MARK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise FileExistsError(f"another process works in {folder}: wait for it, or give another --out") from None
    return descriptor


def _empty(folder: Path) -> None:
    (folder / CONFIG).unlink(missing_ok=True)  # first, so that a half-deleted run cannot be resumed
    for path in folder.iterdir():
        if path.name == MARK:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested dictionaries by dotted name; a list is one value."""
    if not isinstance(tree, Mapping) or not tree:
        yield prefix.removesuffix("."), tree
        return
    for key, value in tree.items():
        yield from flatten(value, f"{prefix}{key}.")
