"""Output folders: what may be written where, and what a run there was made with."""

from __future__ import annotations

import shutil
from itertools import count
from pathlib import Path

import yaml
from jsonargparse import Namespace

from duorl.evaluate import flatten

_MARK = ".duorl"  # tells a folder of ours, which --overwrite may delete, from any other with a config.yaml


def check_folder(options: Namespace) -> None:
    """Refuse an output folder that already holds something, unless told what to do with it.

    Raises:
        FileExistsError: neither `overwrite` nor `resume` is set, or what would be overwritten is not a run.
        FileNotFoundError: there is nothing to resume.
    """
    folder = Path(options.out) if options.out else None
    held = folder is not None and folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    resume = options.get("resume", False)
    if resume and options.overwrite:
        raise ValueError("--resume goes on with what --overwrite would delete: give one of them")
    if resume and not held:
        raise FileNotFoundError(f"nothing to resume: --out {folder} holds no run")
    if folder is None or not held:
        return
    if not (options.overwrite or resume):
        raise FileExistsError(f"{folder} already holds files: give --overwrite to replace a run, or another --out")
    if not ((folder / _MARK).is_file() and (folder / "config.yaml").is_file()):
        raise FileExistsError(f"{folder} holds files but no run (no {_MARK}): give another --out")
    if Path.cwd().is_relative_to(folder.resolve()):
        raise FileExistsError(f"{folder} is where you stand: give another --out")


def check_same_options(options: Namespace, config: str) -> None:
    """Refuse to resume a run with options other than its own: routers of different kinds would stand in one table."""
    if not options.resume:
        return
    now, then = (
        dict(flatten(yaml.safe_load(text))) for text in (config, (Path(options.out) / "config.yaml").read_text())
    )
    for name in sorted((now.keys() | then.keys()) - {"resume", "overwrite", "out"}):
        if now.get(name) != then.get(name):
            raise ValueError(
                f"{options.out} was made with {name} {then.get(name)}, not {now.get(name)}: cannot resume it"
            )


def make_folder(options: Namespace, name: str, config: str) -> Path:
    """The output folder, emptied where it is overwritten, with the resolved configuration in it."""
    folder = Path(options.out) if options.out else _free_folder(name)
    if options.overwrite and folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MARK).touch()
    (folder / "config.yaml").write_text(config)
    return folder


def _free_folder(name: str) -> Path:
    return next(folder for n in count(1) if not (folder := Path("runs") / f"{name}-{n}").exists())
