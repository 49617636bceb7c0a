"""`duorl convert`."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from rich.table import Table
from torch import Tensor, nn

from duorl import ranks
from duorl.checks import BadInput
from duorl.corpus import load_windows, source_names, spread
from duorl.devices import pick_dtype, pick_trainers_device, require_memory
from duorl.evaluation.choice import duration, flops_per_second
from duorl.experiments.trainings import finish_all
from duorl.experiments.voice import command, say, show
from duorl.files import write_json
from duorl.models.bases import Base, cast_weights, find_base, read_object, recorded_in
from duorl.models.card import write_small_card
from duorl.models.config import DuoConfig
from duorl.models.conversion import convert
from duorl.models.families import inner_size, small_size
from duorl.models.footprint import weight_bytes
from duorl.models.loading import check_windows, load
from duorl.models.modeling import DuoForCausalLM
from duorl.models.saving import save
from duorl.models.shared import WEIGHTS, cast_small, fingerprint, remember_base, save_small, take_small
from duorl.runs import interrupts
from duorl.runs.folders import abandon
from duorl.runs.jobs import InProcess, Job, Tell
from duorl.runs.journal import Journal
from duorl.runs.pretraining import Saving
from duorl.smalls import ConvertOptions, Making, held_out_losses
from duorl.smalls.recipe import STAGES, Stage
from duorl.smalls.recording import in_own_precision

_BASE = Path("stages", "base.json")  # in the folder: the base model with which the run began
_SAVED = torch.bfloat16  # precision of the small networks in their file
_PRICE = 0.75  # of the loss between all-small and all-big: there routers spend about half of the compute
_TIMED_WINDOWS = 4  # for the speed of the machine
_CARD_WINDOWS = 64  # of the evaluation split of each text
_CARD_COLUMNS = ("minutes", "all_small", "half_big", "all_big")
_SAYS = {
    "choose": "takes the most useful neurons of big and fits the last map",
    "regress": "learns big's outputs, layer by layer",
    "distil": "learns all small networks together under random routing",
}


def prepare(options: Namespace, config: dict[str, Any]) -> tuple[str, Callable[[Path], None]]:
    """The folder, and the function that makes the small networks in it.

    Raises:
        ValueError, OSError: the model cannot be found or converted, or the text cannot be used.
    """
    settings = ConvertOptions(**{name: getattr(options, name) for name in ConvertOptions.__dataclass_fields__})
    began = _began(settings) if options.resume else None
    base = _base(settings.model, began)
    device = pick_trainers_device(options.device)
    dtype = pick_dtype(options.dtype, device, base.config.hidden_size)
    _require_room(base, settings.small_ratio, device, dtype)
    tokenizer = base.tokenizer()
    read = partial(load_windows, tokenizer=tokenizer, length=settings.window)
    sources = source_names(settings.corpus)
    training, held_out = (torch.cat([read(name, split=split) for name in sources]) for split in ("model", "router"))
    texts = {name: read(name, split="evaluation") for name in sources}
    model = convert(base.load(), small_ratio=settings.small_ratio)
    remember_base(model, base)
    if began is not None:
        _require_same(model, base, began, settings.out)
    cast_weights(model, dtype)
    nn.Module.to(model, device)
    for windows in (training, held_out, *texts.values()):
        check_windows(model, windows)
    making = Making(model, settings, training, held_out)

    def work(folder: Path) -> None:
        if began is None and ranks.first():
            write_json(folder / _BASE, recorded_in((folder / _BASE).parent, model.config.base))
        jobs = _jobs(making, folder)
        _say_costs(making, [job for job in jobs if not job.finished])
        try:
            finish_all(jobs, InProcess(), folder)
        except BadInput:
            if not (folder / "config.json").is_file():  # no model of a run --until an earlier stage
                abandon(folder)
            raise
        if not ranks.first():
            return
        _finish(making, base, texts, jobs, folder, whole=options.whole)
        if options.whole:  # the base model's weights too, as they are stored
            save(load(folder, dtype=base.load(None).dtype), base.tokenizer(), folder)
        say(f"wrote {folder}/: load it with --model {folder}")

    return "convert", work


def _began(settings: ConvertOptions) -> dict[str, Any] | None:
    """The base model at the start of the run in the folder, if it has come so far."""
    path = Path(settings.out) / _BASE
    return read_object(path) if path.is_file() else None


def _base(name: str, began: dict[str, Any] | None) -> Base:
    """The base model, at the commit of the hub with which the run began."""
    base = find_base(name)
    commit = began and began.get("revision")
    return base if commit in (None, base.revision) else find_base(f"{base.name}@{commit}")


def _require_same(model: DuoForCausalLM, base: Base, began: dict[str, Any], out: str) -> None:
    """Refuse to go on with another base model: its small networks would be trained on two."""
    if began.get("fingerprint") != fingerprint(model):
        fix = "give that one, or --overwrite to begin anew"
        raise ValueError(f"{base} has other big networks than the model with which the run in {out} began: {fix}")


def _require_room(base: Base, small_ratio: int, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse a model that does not fit into memory: a conversion has it and its copy, an accelerator the copy."""
    config = DuoConfig(backbone=base.config.to_dict(), small_size=small_size(base.config, small_ratio))
    needed = 2 * weight_bytes(config, torch.float32)
    require_memory(needed, torch.device("cpu"), f"{base} and its duo model", "give a smaller model")
    if device.type != "cpu":
        fix = "give --dtype bfloat16, another --device or a smaller model"
        require_memory(weight_bytes(config, dtype), device, f"the weights of the duo model of {base}", fix)


def _jobs(making: Making, folder: Path) -> list[Job]:
    jobs: list[Job] = []
    for stage in making.options.stages:
        before = jobs[-1] if jobs else None
        place = folder / "stages" / stage
        function = partial(_run, making, stage, place, before.place if before else None)
        jobs.append(Job(stage, place, function, after=(before.name,) if before else ()))
    return jobs


def _run(making: Making, stage: Stage, place: Path, after: Path | None, tell: Tell) -> dict[str, Any]:
    """The function of a stage's job."""
    started = time.monotonic()

    def tell_or_stop(**said: Any) -> None:
        tell(**said)
        interrupts.check()  # in `choose`, after every pass; the other stages stop when they have saved

    losses = making.run(stage, place, tell_or_stop, after=after, callbacks=[Saving(tell)])
    if stage == "choose" and ranks.first():  # the Trainer writes those of the other stages
        shutil.rmtree(place / "tensorboard", ignore_errors=True)
        journal = Journal(place / "tensorboard")
        journal.scalars(0, {f"eval/{name}": loss for name, loss in losses.items()})
        journal.close()
    words = ", ".join(f"{name.replace('_', '-')} {loss:.3f}" for name, loss in losses.items())
    tell(line=f"held-out loss {words} nats per token")
    return {**losses, "minutes": round((time.monotonic() - started) / 60, 1)}


def _say_costs(making: Making, jobs: list[Job]) -> None:
    """What each stage reads and about how long it takes on this machine."""
    with in_own_precision(making.model):
        speed = flops_per_second(making.model, making.training, batch=_TIMED_WINDOWS)
    for stage in (stage for stage in STAGES if stage in {job.name for job in jobs}):
        tokens, flops = making.cost(stage)
        say(f"{stage}: {_SAYS[stage]}; {tokens:,} tokens, about {duration(flops / speed)}")


def _finish(
    making: Making, base: Base, texts: dict[str, Tensor], jobs: list[Job], folder: Path, *, whole: bool
) -> None:
    """Write the small networks, and the card with losses on the evaluation split."""
    model = making.model
    take_small(model, jobs[-1].place / WEIGHTS)
    cast_small(model, _SAVED)
    gap = jobs[-1].result["all_small"] - jobs[-1].result["all_big"]
    model.config.price = round(_PRICE * gap, 2) if gap > 0.01 else None
    save_small(model, folder)
    cast_small(model, model.dtype)  # what is measured is what was saved
    losses = {name: _measured(model, windows) for name, windows in texts.items()}
    write_small_card(folder, facts=_facts(making, base, jobs), losses=losses, header=base.header, whole=whole)
    _print(losses)


def _facts(making: Making, base: Base, jobs: list[Job]) -> dict[str, Any]:
    """What the card says."""
    model, settings = making.model, making.options
    stages = [
        {"stage": stage, "tokens": making.cost(stage)[0], **{name: job.result[name] for name in _CARD_COLUMNS}}
        for stage, job in zip(making.options.stages, jobs, strict=True)
    ]
    return {
        "name": f"Small networks for {base}",
        "base": str(base),
        "command": command(),
        "inner size of big and small": f"{inner_size(model.config.backbone)}, {model.config.small_size}",
        "layers, hidden size": f"{model.num_layers}, {model.hidden_size}",
        "text": ", ".join(source_names(settings.corpus)),
        "tokens per window": settings.window,
        "stages": stages,
    }


def _measured(model: DuoForCausalLM, windows: Tensor) -> dict[str, float]:
    windows = spread(windows, _CARD_WINDOWS)
    return {"tokens": windows[:, 1:].numel(), **held_out_losses(model, windows)}


def _print(losses: dict[str, dict[str, float]]) -> None:
    table = Table(title="Loss in nats per token on the evaluation split")
    for name in ("text", "tokens", "all-small", "half big, at random", "all-big"):
        table.add_column(name, justify="left" if name == "text" else "right")
    for text, found in losses.items():
        cells = [f"{found[name]:.3f}" for name in ("all_small", "half_big", "all_big")]
        table.add_row(text, f"{found['tokens']:,}", *cells)
    show(table)
