"""Makes token windows from text: built-in corpora, a user's own files, and the three splits.

The model is trained on the split `model`. Routers are trained on `router`, which the model never saw. `evaluation` is
used for measurements only. The split of a document is a hash of its path. So it is the same on every Python version,
and the docstrings of a module are in the same split as its source.

    windows = load_windows(["stdlib-code"], tokenizer, split="router", length=128)    # (W, 129)
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from glob import glob
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Split = Literal["model", "router", "evaluation"]
# Ends of the three splits on the unit interval of hashes.
_SPLIT_ENDS = {"model": 0.7, "router": 0.85, "evaluation": 1.0}
# Not used: tables of code points, generated text (it is in `stdlib-docs`), packages that not every Python has.
_EXCLUDED_PACKAGES = {"encodings", "pydoc_data", "site-packages", "dist-packages", "__pycache__"}
_TEST_PACKAGES = {"test", "tests", "idle_test"}
_LOADERS = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}
_BLOCK_CHARACTERS = 16384


Keep = Callable[[str], bool]
"""Whether a document with this path is wanted; called before its text is read."""


class Document(NamedTuple):
    """One text; `path` is its name on every machine and decides its split; `file` names the file that holds it."""

    path: str
    text: str
    file: str = ""


class Windows(NamedTuple):
    """Windows of text, and where they are from.

    Attributes:
        tokens: (W, T+1), see `load_windows`.
        files: (W,), the number of the file (the row of a table) in which a window's first predicted token stands:
            windows of one file are not independent. Where there is one file alone, of a run of windows in it.
    """

    tokens: Tensor
    files: Tensor


def split_of(path: str) -> Split:
    """The split of a document: 70 % model, 15 % router, 15 % evaluation, by a hash of its path."""
    place = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") / 2**64
    return next(split for split in get_args(Split) if place < _SPLIT_ENDS[split])


def _stdlib_files(keep: Keep, *, tests: bool) -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        parts = set(name.parts)
        built_here = any(part.startswith(("_sysconfigdata", "config-")) for part in name.parts)
        if built_here or parts & _EXCLUDED_PACKAGES or bool(parts & _TEST_PACKAGES) != tests:
            continue
        if not keep(name.as_posix()):
            continue
        text = path.read_text("utf8", errors="replace")
        if text.strip():
            yield Document(name.as_posix(), text)


def _docstrings(document: Document) -> str:
    try:
        tree = ast.parse(document.text)
    except (SyntaxError, ValueError):  # lib2to3 has Python 2 sources
        return ""
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, holders))
    return "\n\n".join(text for text in found if text)


def _stdlib_docs(keep: Keep) -> Iterator[Document]:
    for document in _stdlib_files(keep, tests=False):
        if text := _docstrings(document):
            yield Document(document.path, text)
    for topic, text in sorted(importlib.import_module("pydoc_data.topics").topics.items()):
        if keep(f"pydoc_data/{topic}"):
            yield Document(f"pydoc_data/{topic}", text)


BUILT_IN: dict[str, Callable[[Keep], Iterator[Document]]] = {
    "stdlib-code": partial(_stdlib_files, tests=False),
    "stdlib-docs": _stdlib_docs,
    "stdlib-tests": partial(_stdlib_files, tests=True),
}


def _text_blocks(name: str, text: str) -> Iterator[Document]:
    """Cut a long file at line ends, so that a single file can serve all three splits."""
    lines, size, file = [], 0, _named(name, text)
    for line in text.splitlines(keepends=True):
        lines.append(line)
        size += len(line)
        if size >= _BLOCK_CHARACTERS:
            yield _block(name, "".join(lines), file)
            lines, size = [], 0
    if lines:
        yield _block(name, "".join(lines), file)


def _block(name: str, text: str, file: str) -> Document:
    return Document(_named(name, text), text, file)


def _named(name: str, text: str) -> str:
    """A block or row has no path, so a digest of its text is part of its name."""
    return f"{name}#{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def check_sources(sources: str | Sequence[str]) -> None:
    """Check that the sources exist, without reading the text; errors as for `documents`."""
    for source in source_names(sources):
        for path in [] if source in BUILT_IN else _files(source):
            _check_file(path)


def _files(pattern: str) -> list[Path]:
    paths = sorted(path for path in map(Path, glob(pattern, recursive=True)) if path.is_file())
    if not paths:
        raise FileNotFoundError(
            f"no text at {pattern!r}: give a file, a glob, or one of the built-in corpora {', '.join(BUILT_IN)}"
        )
    return paths


def _user_files(pattern: str, keep: Keep) -> Iterator[Document]:
    for path in _files(pattern):
        yield from (document for document in _user_file(path) if keep(document.path))


def _check_file(path: Path) -> None:
    if path.suffix not in _LOADERS:
        raise ValueError(f"cannot read {path}: text comes as {', '.join(_LOADERS)}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty: give a file with text")


def _user_file(path: Path) -> Iterator[Document]:
    _check_file(path)
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    whole_file = {"sample_by": "document"} if path.suffix == ".txt" else {}
    try:
        rows = load_dataset(_LOADERS[path.suffix], data_files=str(path), split="train", **whole_file)
    except Exception as error:  # loaders raise errors of pyarrow and pandas
        raise ValueError(f"cannot read {path} as {path.suffix}: {error}") from error
    if "text" not in rows.column_names:
        raise ValueError(f"{path} has no column 'text', only {', '.join(rows.column_names)}: rename one")
    for text in rows["text"]:
        yield from _text_blocks(path.name, text or "")


def source_names(sources: str | Sequence[str]) -> list[str]:
    """One source or several, as a list."""
    return [sources] if isinstance(sources, str) else list(sources)


def documents(sources: str | Sequence[str], split: Split) -> list[Document]:
    """All documents of one split.

    Args:
        sources: names of built-in corpora (`BUILT_IN`), or paths and globs of .txt, .jsonl and .parquet
            files, the latter two with a column `text`.
        split: the split.

    Returns:
        The documents in the order of their hashes, a fixed random order.

    Raises:
        FileNotFoundError: a path or glob matches nothing.
        ValueError: a file cannot be read, or is empty.
    """

    def keep(path: str) -> bool:
        return split_of(path) == split

    found: list[Document] = []
    for source in source_names(sources):
        found += BUILT_IN[source](keep) if source in BUILT_IN else _user_files(source, keep)
    return sorted(found, key=lambda document: hashlib.sha256(document.path.encode()).digest()[8:])


def load_windows(sources: str | Sequence[str], tokenizer, *, split: Split, length: int) -> Tensor:
    """The token windows of one split.

    The documents are joined with an end-of-text token between them and cut into windows that overlap by one token. So
    every token except the first is predicted once. Windows are in a fixed random order, so that the first few are from
    all documents.

    Args:
        sources: see `documents`.
        tokenizer: a transformers tokenizer with an `eos_token_id`.
        split: the split.
        length: tokens to predict per window, T.

    Returns:
        Shape (W, T+1), int64; columns 0..T-1 are the inputs, 1..T the targets.

    Raises:
        FileNotFoundError: a path or glob matches nothing.
        ValueError: a file cannot be read, or the split's text is shorter than one window.
    """
    return read_windows(sources, tokenizer, split=split, length=length).tokens


def read_windows(sources: str | Sequence[str], tokenizer, *, split: Split, length: int) -> Windows:
    """The token windows of one split, and which files they are from; arguments and errors as for `load_windows`."""
    windows = cut(documents(sources, split), tokenizer, length)
    if windows is None:
        raise ValueError(
            f"the {split} split of {', '.join(source_names(sources))} is shorter than a window of {length} + 1 tokens: "
            "give more text or a smaller window"
        )
    return windows


def cut(texts: Sequence[Document], tokenizer, length: int) -> Windows | None:
    """Windows of some documents, see `load_windows`; None if the text is shorter than one window."""
    encoded = tokenizer([document.text for document in texts], add_special_tokens=False)["input_ids"] if texts else []
    end = tokenizer.eos_token_id
    stream = torch.tensor([token for ids in encoded for token in (*ids, end)], dtype=torch.int64)
    if len(stream) <= length:
        return None
    windows = stream.unfold(0, length + 1, length)
    files = _files_of(len(windows), [document.file or document.path for document in texts], encoded, length)
    shuffled = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    return Windows(windows[shuffled], files[shuffled])


def _files_of(count: int, names: Sequence[str], encoded: Sequence[Sequence[int]], length: int) -> Tensor:
    """See `Windows.files`; runs are of W^(1/3) windows, the order at which a block bootstrap's variance errs least.

    The order is of Hall, Horowitz and Jing (1995), On blocking rules for the bootstrap with dependent data.
    """
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    if len(numbers) == 1:
        return torch.arange(count) // round(count ** (1 / 3))
    ends = torch.tensor([len(ids) + 1 for ids in encoded]).cumsum(0)
    first_predicted = torch.arange(count) * length + 1
    return torch.tensor([numbers[name] for name in names])[torch.searchsorted(ends, first_predicted, right=True)]
