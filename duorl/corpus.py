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
import json
import re
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["model", "router", "evaluation"]
# Ends of the three splits on the unit interval of hashes.
_SPLIT_ENDS = {"model": 0.7, "router": 0.85, "evaluation": 1.0}
# Not used: tables of code points, generated text (it is in `stdlib-docs`), packages that not every Python has.
_EXCLUDED_PACKAGES = {"encodings", "pydoc_data", "site-packages", "dist-packages", "__pycache__"}
_TEST_PACKAGES = {"test", "tests", "idle_test"}
_COLUMN = "text"
_BLOCK_CHARACTERS = 16384
_NO_TEXT = re.compile(r"[\x00\ud800-\udfff]")
_OTHER_FORMATS = {b"\x1f\x8b": "gzip", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"PK\x03\x04": "a zip archive"}


Keep = Callable[[str], bool]
"""Whether a document with this path is wanted; called before its text is read."""


class Document(NamedTuple):
    """One text; `path` is its name on every machine and decides its split; `file` names the file that holds it."""

    path: str
    text: str
    file: str = ""


class Windows(NamedTuple):
    """Windows of text, with their files.

    Attributes:
        tokens: (W, T+1), see `load_windows`.
        files: (W,), the number of the file (the row of a table) in which a window's first predicted token stands:
            windows of one file are not independent. Where there is one file alone, of a run of windows in it.
    """

    tokens: Tensor
    files: Tensor

    def first(self, count: int) -> Windows:
        """The first windows, at most `count`."""
        return Windows(self.tokens[:count], self.files[:count])


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
    for line in _short_lines(text):
        lines.append(line)
        size += len(line)
        if size >= _BLOCK_CHARACTERS:
            yield _block(name, "".join(lines), file)
            lines, size = [], 0
    if lines:
        yield _block(name, "".join(lines), file)


def _short_lines(text: str) -> Iterator[str]:
    """Lines with their line ends. A line that is longer than a block is cut at spaces, or anywhere without spaces."""
    for line in text.splitlines(keepends=True):
        start = 0
        while len(line) - start > _BLOCK_CHARACTERS:
            end = line.rfind(" ", start, start + _BLOCK_CHARACTERS) + 1 or start + _BLOCK_CHARACTERS
            yield line[start:end]
            start = end
        yield line[start:]


def _block(name: str, text: str, file: str) -> Document:
    return Document(_named(name, text), text, file)


def _named(name: str, text: str) -> str:
    """A block or row has no path, so a digest of its text is part of its name."""
    return f"{name}#{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def check_sources(sources: str | Sequence[str]) -> None:
    """Check that the sources exist, without reading the text; errors as for `documents`."""
    names = source_names(sources)
    paths = [path for source in names for path in source_files(source)]
    named = [source for source in names if source in BUILT_IN] + [str(path.resolve()) for path in paths]
    if twice := sorted({name for name in named if named.count(name) > 1}):
        raise ValueError(f"{twice[0]} is named twice in {', '.join(names)}: name each text once")
    for path in paths:
        _check_file(path)


def source_files(source: str) -> list[Path]:
    """The files of one source; none for a built-in corpus; errors as for `documents`."""
    return [] if source in BUILT_IN else _files(source)


def _files(pattern: str) -> list[Path]:
    literal = [pattern] if Path(pattern).is_file() else glob(pattern, recursive=True)
    paths = sorted(path for path in map(Path, literal) if path.is_file())
    if not paths:
        hint = f"it is a folder, give {pattern.rstrip('/')}/*.txt" if Path(pattern).is_dir() else "give a file, a glob"
        raise FileNotFoundError(f"no text at {pattern!r}: {hint}, or one of the built-in corpora {', '.join(BUILT_IN)}")
    return paths


def _user_files(pattern: str, keep: Keep) -> Iterator[Document]:
    for path in _files(pattern):
        yield from (document for document in _user_file(path) if keep(document.path))


def _check_file(path: Path) -> None:
    if path.suffix.lower() not in _READERS:
        raise ValueError(f"cannot read {path}: text comes as {', '.join(_READERS)}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty: give a file with text")


def _user_file(path: Path) -> Iterator[Document]:
    _check_file(path)
    some = False
    for place, text in _READERS[path.suffix.lower()](path):
        if not isinstance(text, str):
            raise ValueError(f"{place}: '{_COLUMN}' is {_json_name(text)}, not a string: mend it or leave the row out")
        _check_characters(place, text)
        some = some or not text.isspace()
        yield from _text_blocks(path.name, text)
    if not some:
        raise ValueError(f"{path} holds no text: give a file with text")


def _whole_text(path: Path) -> Iterator[tuple[str, Any]]:
    """A text file's text with its place, which is the file."""
    text = _decoded(path, path.read_bytes()).removeprefix("\ufeff")
    yield str(path), text.replace("\r\n", "\n").replace("\r", "\n")


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The text of every line that is not blank, with its place."""
    offset = 0
    with path.open("rb") as file:
        for number, content in enumerate(file, start=1):
            line, place = _decoded(path, content, offset), f"{path}, line {number}"
            offset += len(content)
            if number == 1:
                line = line.removeprefix("\ufeff")
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{place} is not JSON ({error}): write one object a line") from error
            if not isinstance(row, dict):
                raise ValueError(f"{place} is {_json_name(row)}, not an object: write one object a line")
            _check_column(place, list(row))
            yield place, row[_COLUMN]


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The text of every row, with its place."""
    from pyarrow import parquet

    number = 0
    try:
        file = parquet.ParquetFile(path)
        _check_column(str(path), file.schema_arrow.names)
        for batch in file.iter_batches(columns=[_COLUMN]):
            for text in batch.column(0).to_pylist():
                number += 1
                yield f"{path}, row {number}", text
    except ImportError:
        raise
    except Exception as error:  # pyarrow raises errors of many classes
        if str(error).startswith(str(path)):
            raise
        raise ValueError(f"cannot read {path} as Parquet after row {number}: {error}") from error


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".txt": _whole_text,
    ".jsonl": _json_rows,
    ".parquet": _parquet_rows,
}


def _decoded(path: Path, content: bytes, offset: int = 0) -> str:
    """Bytes from a place of a file as text."""
    try:
        return content.decode("utf8")
    except UnicodeDecodeError as error:
        place, found = offset + error.start, content[error.start]
        starts = {} if offset else _OTHER_FORMATS
        kind = next((name for start, name in starts.items() if content.startswith(start)), None)
        fix = f"it looks like {kind}, convert it" if kind else "convert it, with iconv -f LATIN1 -t UTF-8 for instance"
        raise ValueError(f"{path} is not UTF-8: byte {place} is 0x{found:02x}; {fix}") from error


def _check_column(place: str, names: Sequence[str]) -> None:
    if names.count(_COLUMN) != 1:
        found = "more than one" if _COLUMN in names else "no"
        raise ValueError(f"{place} has {found} column '{_COLUMN}', only {', '.join(map(str, names))}: rename one")


def _check_characters(place: str, text: str) -> None:
    """Refuse characters that no text has: NUL (in binary files), and halves of surrogate pairs (possible in JSON)."""
    found = _NO_TEXT.search(text)
    if found:
        line = text.count("\n", 0, found.start()) + 1
        raise ValueError(f"{place}: line {line} of the text holds U+{ord(found[0]):04X}, which no text has: remove it")


def _json_name(value: Any) -> str:
    """The JSON name of the type of a value."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", list: "an array"}
    return names.get(type(value), "an object" if isinstance(value, dict) else f"of type {type(value).__name__}")


def source_names(sources: str | Sequence[str]) -> list[str]:
    """One source or several, as a list.

    Raises:
        ValueError: there is none.
    """
    names = [sources] if isinstance(sources, str) else list(sources)
    if not all(names) or not names:
        raise ValueError(f"no text is named in {names}: give a file, a glob, or one of {', '.join(BUILT_IN)}")
    return names


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
        ValueError: a file or a row is empty, not UTF-8 or broken; the message names the file and the place.
    """

    def keep(path: str) -> bool:
        return split_of(path) == split

    found: list[Document] = []
    for source in source_names(sources):
        found += BUILT_IN[source](keep) if source in BUILT_IN else _user_files(source, keep)
    return sorted(found, key=lambda document: hashlib.sha256(document.path.encode()).digest()[8:])


def load_windows(
    sources: str | Sequence[str], tokenizer: PreTrainedTokenizerBase, *, split: Split, length: int
) -> Tensor:
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


def spread(windows: Tensor, count: int) -> Tensor:
    """At most `count` of the windows (W, T+1), at equal distances in the text."""
    return windows[:: max(1, len(windows) // count)][:count]


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
    """See `Windows.files`; a block has W^(1/3) windows, the best order for the variance of a block bootstrap.

    The order is of Hall, Horowitz and Jing (1995), On blocking rules for the bootstrap with dependent data.
    """
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    if len(numbers) == 1:
        return torch.arange(count) // round(count ** (1 / 3))
    ends = torch.tensor([len(ids) + 1 for ids in encoded]).cumsum(0)
    first_predicted = torch.arange(count) * length + 1
    return torch.tensor([numbers[name] for name in names])[torch.searchsorted(ends, first_predicted, right=True)]
