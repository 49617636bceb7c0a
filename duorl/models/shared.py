"""Small networks saved apart from their base model, and put together with it again.

    save_small(model, "small", find_base("owner/name"))       # a few megabytes
    model = duorl.load("small")                               # finds the base model

The folder's `config.json` names the base model in `base`, with a fingerprint of its big networks. `small.safetensors`
holds a tensor `LAYER.NAME` for every tensor NAME of a layer's small network.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from duorl import hub
from duorl.extensions import find, not_from
from duorl.files import writing_folder
from duorl.models.bases import Base, cast_weights, find_recorded, recorded_in
from duorl.models.families import family_of

if TYPE_CHECKING:
    from duorl.models.config import DuoConfig
    from duorl.models.modeling import DuoForCausalLM

    Duo = TypeVar("Duo", bound=DuoForCausalLM)

WEIGHTS = "small.safetensors"
FILES = ("*.json", "*.jinja", "*.safetensors", "*.md", "*.png")
"""What is fetched of a repository on the hub."""
ROUTER = "own_router"
"""The folder, in a model's, of the router of a view."""
OF_MODEL = (
    *("config.json", "generation_config.json", WEIGHTS, ROUTER),
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
)
"""Patterns of what a save replaces in the folder of a model."""
CARD = ("README.md", "curve.png")
"""The files of a model's card."""


def fingerprint(model: DuoForCausalLM) -> str:
    """Identify the big networks of a model: SHA-256 over the shape, the first and the last row of every weight.

    The rows are rounded to bfloat16. So a model that is loaded in float32 and in bfloat16 has the same fingerprint.
    """
    digest = sha256()
    for ffn in model.stack.ffns:
        for weight in ffn.big.parameters():
            digest.update(str(tuple(weight.shape)).encode())
            rows = weight.detach().reshape(-1, weight.shape[-1])[[0, -1]]  # of a bias, twice all of it
            digest.update(rows.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def remember_base(model: DuoForCausalLM, base: Base) -> None:
    """Let a model know its base model and the fingerprint: before its weights are rounded to float16 or trained.

    Raises:
        ValueError: it is in float16 already, which may have changed the big networks.
    """
    model.config.base = _identified(model, base)


def _identified(model: DuoForCausalLM, base: Base) -> dict[str, str | None]:
    if _is_half(model):
        raise ValueError("float16 may have rounded the big networks: load the base model in float32 or bfloat16")
    return {**base.record(), "fingerprint": fingerprint(model)}


def save_small(model: DuoForCausalLM, folder: str | Path, base: Base | None = None, *, shared: bool = False) -> None:
    """Save the small networks, each weight in its precision: `small.safetensors`, and last `config.json`.

    A view with a router is saved with the router. Until all files are written, the folder has its old state.

    Args:
        model: a duo model.
        folder: it is made if there is none.
        base: the base model, whose networks are the big ones; by default the one that it was loaded with or remembers.
        shared: the folder leaves this machine: of a base model in a folder only the name is kept, and no path.

    Raises:
        ValueError: a weight is not finite, the base model is not known, or the big networks are not its any more.
    """
    known = model.config.base if base is None else _identified(model, base)
    if known is None:
        raise ValueError("small networks are saved with the name of their base model: give base=find_base(...)")
    if base is None and not _is_half(model) and fingerprint(model) != known["fingerprint"]:
        raise ValueError(f"the big networks are not those of {known['name']} any more: save the whole model")
    folder, weights = Path(folder), small_weights(model)
    if broken := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
        raise ValueError(f"the small networks are not saved: {broken[0]} holds numbers that are not finite")
    config = copy.deepcopy(model.config)
    config.base = recorded_in(folder, known, shared=shared)
    config.backbone._name_or_path = config.base["name"]
    config.architectures, config.dtype = [type(model).__name__], model.dtype
    with writing_model(folder) as beside:
        save_file(weights, beside / WEIGHTS, {"format": "pt"})
        save_router(model, beside)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(beside)
        config.save_pretrained(beside)


def writing_model(folder: str | Path, *, beside_others: bool = False) -> AbstractContextManager[Path]:
    """As `duorl.files.writing_folder`, for a model: all that the folder has of an earlier one goes.

    Args:
        folder: the folder.
        beside_others: other weights of the same model stay, those of another `variant`.
    """
    return writing_folder(folder, last="config.json", stale=() if beside_others else OF_MODEL)


def save_router(model: DuoForCausalLM, folder: Path) -> None:
    """Save the router of a view in the folder of the model.

    Raises:
        ValueError: it cannot be saved.
    """
    router: Any = model.own_router
    if router is None:
        return
    if not hasattr(router, "save_pretrained"):
        raise ValueError(f"{router!r} cannot be saved with the model: make it a duorl.routers.Router")
    router.save_pretrained(folder / ROUTER)


def with_saved_router(model: Duo, folder: Path) -> Duo:
    """The model, or its view with the router that was saved with it. Nothing in the folder is imported for it.

    Raises:
        ValueError: the router cannot be loaded, or does not fit the model.
    """
    if not (folder / ROUTER / "router.json").is_file():
        return model
    load = find("duorl.routers.load")  # routers are made of what stands here, and are found as a user's own parts are
    with not_from(folder):
        router = load(folder / ROUTER)
    return cast("Duo", model.with_router(router.to(model.device)))


def join(kind: type[Duo], folder: Path, config: DuoConfig, *, dtype: torch.dtype | None = None, **more: Any) -> Duo:
    """Find the base model of small networks, check it, and put both together without a copy of its weights.

    Args:
        kind: class of the model.
        folder: of `save_small`.
        config: its configuration.
        dtype: of all weights; by default that with which the small networks were saved.
        more: further arguments of `from_pretrained` for the base model, for example `device_map`.

    Raises:
        OSError: the base model is missing; says what to install or fetch.
        ValueError: the base model is another one, or the small networks do not fit it.
    """
    wanted = dtype or cast("torch.dtype | None", config.dtype) or torch.float32
    base, record = find_recorded(config.base, folder / "config.json"), config.base or {}
    function = family_of(config.backbone).attention_function
    # float16 would round the weights before they are identified, so they are rounded afterwards.
    loaded = base.load(None if wanted == torch.float16 else wanted, attn_implementation=function, **more)
    config.backbone, config.base = loaded.config, {**record, **base.record()}
    config.backbone._name_or_path = str(record["name"])  # a whole model, saved later, tells no path of this machine
    with torch.device("meta"):  # the small networks come from the file
        model = kind(config, backbone=loaded)
    if fingerprint(model) != record.get("fingerprint"):
        made = f"the small networks in {folder} were made for other big networks than those of {base}"
        raise ValueError(f"{made} here: give that base model, or make them anew with duorl convert")
    take_small(model, folder / WEIGHTS)
    cast_weights(model, wanted)
    config.dtype, model.name_or_path = wanted, str(folder)
    model.generation_config = loaded.generation_config
    return model.eval()


def _is_half(model: DuoForCausalLM) -> bool:
    return any(weight.dtype == torch.float16 for ffn in model.stack.ffns for weight in ffn.big.parameters())


def model_files(
    name: str, revision: str | None = None, inside: str | None = None, patterns: Sequence[str] = FILES
) -> Path:
    """The folder of a model: a folder, or a copy of a repository on the hub, or a folder `inside` of it."""
    folder = Path(name) if Path(name).is_dir() else hub.snapshot(name, patterns, revision)
    return folder / (inside or "")


def small_weights(model: DuoForCausalLM) -> dict[str, Tensor]:
    """The weights of the small networks, named `LAYER.NAME`."""
    networks = enumerate(ffn.small for ffn in model.stack.ffns)
    return {
        f"{layer}.{name}": tensor.detach().cpu().contiguous()
        for layer, network in networks
        for name, tensor in network.state_dict().items()
    }


def cast_small(model: DuoForCausalLM, dtype: torch.dtype) -> None:
    """Give the small networks a precision, when their training is over."""
    for ffn in model.stack.ffns:
        ffn.small.requires_grad_(False).to(dtype)


def take_small(model: DuoForCausalLM, path: Path) -> None:
    """Give a model its small networks from a file of `small_weights`, each on the device of big.

    Raises:
        ValueError: the file cannot be read, or holds the networks of another model, or numbers that are not finite.
    """
    try:
        weights = load_file(path)
    except SafetensorError as problem:
        raise ValueError(f"cannot read the weights in {path}: {problem}") from problem
    for layer, ffn in enumerate(model.stack.ffns):
        device = next(ffn.big.parameters()).device
        found = {}
        for name, expected in ffn.small.state_dict().items():
            weight = weights.pop(f"{layer}.{name}", None)
            found[name] = _checked(f"{path}: {layer}.{name}", weight, expected).to(device)
        unmade = next(ffn.small.parameters()).is_meta  # has shapes only
        ffn.small.load_state_dict(found, assign=unmade)
    if weights:
        raise ValueError(f"{path} holds {min(weights)}, which the model of its config.json does not have")


def _checked(called: str, found: Tensor | None, expected: Tensor) -> Tensor:
    if found is None:
        raise ValueError(f"{called} is missing")
    if found.shape != expected.shape:
        raise ValueError(f"{called} has shape {tuple(found.shape)} and not {tuple(expected.shape)}")
    if not found.isfinite().all():
        raise ValueError(f"{called} holds numbers that are not finite")
    return found
