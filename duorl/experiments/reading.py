"""What the options of a command read. Checks before a run, and what other machines need, follow from their types."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from duorl.corpus import check_sources, source_files
from duorl.experiments.built import option_class
from duorl.models.loading import model_folder, own_files
from duorl.paths import Kind, named, option_types


def check_read(command: str, options: Mapping[str, Any]) -> None:
    """Check that the texts and the duo models that options name are there, without reading them.

    Args:
        command: name of the command.
        options: the complete options as plain values.

    Raises:
        ValueError, OSError: one cannot be used; the message names it.
    """
    for name, hint in _types(command).items():
        found = list(named(hint, options.get(name)))
        if texts := [text for kind, text in found if kind == "text"]:
            check_sources(texts)
        for kind, model in found:
            if kind == "duo":
                model_folder(model)


def files_read(command: str, options: Mapping[str, Any]) -> list[Path]:
    """The files and folders in the current folder that options name, for machines that share no files with this one.

    A path that is absolute or leads out of the current folder must be there already.

    Args:
        command: name of the command.
        options: the complete options as plain values.
    """
    found: list[Path] = []
    for name, hint in _types(command).items():
        for kind, text in named(hint, options.get(name)):
            found += [path for path in _FILES[kind](text) if _is_here(path)]
    return list(dict.fromkeys(found))


def _types(command: str) -> dict[str, Any]:
    return option_types(option_class(command))


def _router_files(name: str) -> list[Path]:
    """A router's folder or one with labels; nothing for a constant policy, also if a folder has its name."""
    from duorl.learners.shards import ABOUT  # it imports the learners

    return [Path(name)] if any(Path(name, file).is_file() for file in ("router.json", ABOUT)) else []


def _existing(name: str) -> list[Path]:
    return [Path(name)] if Path(name).exists() else []


def _is_here(path: Path) -> bool:
    return not path.is_absolute() and ".." not in path.parts and path != Path()


_FILES: dict[Kind, Callable[[str], Iterable[Path]]] = {
    "text": source_files,
    "duo": own_files,
    "base": _existing,
    "router": _router_files,
    "file": _existing,
}
