"""Options that name something to read say so in their types, and what it is.

    corpus: list[TextPath] | TextPath
    init: RouterPath | None = None
    table: pathlib.Path                      # in a class of a user: any file or folder

    list(named(RunOptions, {"corpus": "mine/*.txt", ...}))       # [("text", "mine/*.txt"), ...]

From this follow the checks before a run, and what is sent to the machines of a cluster (`duorl.experiments.reading`).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from types import SimpleNamespace, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from duorl.extensions import find

Kind = Literal["text", "duo", "base", "router", "file"]


@dataclass(frozen=True)
class Reads:
    """Metadata of a type: its texts name something to read.

    Args:
        kind: what they name.
        joined_by: what stands between several names in one text.
    """

    kind: Kind
    joined_by: str | None = None


@dataclass(frozen=True)
class OptionsOf:
    """Metadata of a type: its values are options of a class.

    Args:
        path: import path of the class.
    """

    path: str


TextPath = Annotated[str, Reads("text")]
"""A built-in corpus, or a path or glob of text."""
JoinedTexts = Annotated[str, Reads("text", joined_by=", ")]
"""Several texts as one."""
DuoPath = Annotated[str, Reads("duo")]
"""A duo model: an embedded one, a folder, or `owner/name` on the hub."""
BasePath = Annotated[str, Reads("base")]
"""A language model: that of a package, a folder, a .gguf file, or `owner/name` on the hub."""
RouterPath = Annotated[str, Reads("router")]
"""A saved router or labels: a folder, `owner/name` on the hub, or the name of a constant policy."""
FilePath = Annotated[str, Reads("file")]
"""A file or a folder."""


def named(hint: Any, value: Any) -> Iterator[tuple[Kind, str]]:
    """What a value names to read.

    Args:
        hint: the type of an option, or a class with options: a dataclass, or one whose arguments are options.
        value: its value, as in YAML.

    Yields:
        Kind and name; a class that a value names by `class_path` is asked for the types of its own options.
    """
    parts = get_args(hint)
    if isinstance(value, Mapping) and isinstance(value.get("class_path"), str):
        yield from _of_class(find(value["class_path"]), value.get("init_args") or {})
    elif get_origin(hint) is Annotated:
        for mark in hint.__metadata__:
            if isinstance(mark, Reads) and isinstance(value, str):
                yield from ((mark.kind, name) for name in (value.split(mark.joined_by) if mark.joined_by else [value]))
            elif isinstance(mark, OptionsOf) and isinstance(value, Mapping):
                yield from _of_class(find(mark.path), value)
    elif hint is Path and isinstance(value, str | Path):
        yield "file", str(value)
    elif get_origin(hint) in (Union, UnionType):
        for part in parts:
            yield from named(part, value)
    elif isinstance(value, list | tuple) and parts:
        for item in value:
            yield from named(parts[0], item)
    elif isinstance(value, Mapping) and is_dataclass(hint):
        yield from _of_class(hint, value)
    elif isinstance(value, Mapping) and len(parts) > 1:
        for item in value.values():
            yield from named(parts[1], item)


def option_types(kind: Any) -> dict[str, Any]:
    """The types of a class's options by name; those that cannot be found are left out."""
    hints: dict[str, Any] = {}
    for owner in reversed(kind.__mro__) if isinstance(kind, type) else ():
        own, known = vars(owner).get("__init__", owner), vars(inspect.getmodule(owner) or SimpleNamespace())
        for name, text in {**vars(owner).get("__annotations__", {}), **getattr(own, "__annotations__", {})}.items():
            with suppress(NameError, AttributeError):  # a name that only type checkers import
                hints |= get_type_hints(SimpleNamespace(__annotations__={name: text}), known, include_extras=True)
    return hints


def _of_class(kind: Any, values: Mapping[str, Any]) -> Iterator[tuple[Kind, str]]:
    for name, hint in option_types(kind).items():
        yield from named(hint, values.get(name))
