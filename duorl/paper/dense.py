"""Compares a duo with dense models of the same FLOPs and with small networks beside a frozen model (Duo-LLM, Fig. 8).

One recipe trains all models, each from scratch except the last:

- `duo`: both networks, under random routing;
- `dense-N`: one network of inner size N in every layer, with the FLOPs of a duo with some share of big;
- `frozen`: small networks beside the dense model of big's size, which does not change.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from duorl.checks import require_positive
from duorl.corpus import Windows, read_windows
from duorl.evaluation.statistics import estimate
from duorl.markdown import grid
from duorl.models import DuoForCausalLM, load, load_tokenizer
from duorl.models.families import inner_size, inner_size_name
from duorl.models.pretrain import Pretraining, backbone_config
from duorl.models.recipe import PretrainOptions
from duorl.models.trainer import random_routes
from duorl.paths import JoinedTexts


@dataclass(frozen=True)
class DenseOptions:
    """Train a duo and dense models of the same FLOPs with one recipe, and measure them on held-out text.

    Args:
        recipe: stage 1 of the duo: options of `duorl pretrain`, or a YAML file of them. The folder in it is not used.
        shares: shares of big for which the duo is measured, each with a dense model of equal FLOPs.
        texts: texts of the measurement: built-in corpora, or paths and globs; ", " joins several into one.
        windows: number of windows of each text's evaluation split.
        processes: number of trainings at the same time; they share the machine's cores.
        cluster: `auto` for the Ray cluster of this machine, or the HOST:PORT of its head: trainings run on its
            machines, in place of processes here. It needs the extra `ray`, see docs/how-to/machines.md.
        seed: seed of the routes in the measurement.
        out: folder for the models and dense.json; by default the first free `runs/dense-N`.
    """

    recipe: PretrainOptions
    shares: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    texts: tuple[JoinedTexts, ...] = ("stdlib-code", "stdlib-docs")
    windows: int = 128
    processes: int = 1
    cluster: str | None = None
    seed: int = 0
    out: str | None = None

    def __post_init__(self) -> None:
        require_positive(windows=self.windows, processes=self.processes)
        if not self.shares or not all(0 <= share <= 1 for share in self.shares):
            raise ValueError(f"shares must be in [0, 1], not {list(self.shares)}")


def plan(recipe: PretrainOptions, shares: Sequence[float], folder: Path) -> dict[str, PretrainOptions]:
    """The trainings by name; `frozen` is the last and starts from the dense model of big's size.

    An inner size of small + share * (big - small) has the FLOPs of a duo with that share of big, because the FLOPs of a
    network are proportional to its inner size.

    Raises:
        ValueError: the recipe starts from a model, so the duo would not be trained from scratch.
    """
    if recipe.model is not None:
        raise ValueError("the recipe must build its model from `backbone`: all models are trained from scratch")
    sizes = [dense_size(recipe, share) for share in shares]
    full = dense_size(recipe, 1.0)
    jobs = {"duo": recipe}
    for size in dict.fromkeys([*sizes, full]):
        jobs[f"dense-{size}"] = replace(recipe, backbone=_resized(recipe, size), big_share=1.0)
    jobs["frozen"] = replace(recipe, model=str(folder / f"dense-{full}"), trained="small")
    return {name: replace(job, out=str(folder / name)) for name, job in jobs.items()}


def dense_size(recipe: PretrainOptions, share: float) -> int:
    """Inner size of the dense network with the FLOPs of a duo with a share of big decisions."""
    big = inner_size(backbone_config(recipe.backbone))
    small = max(1, big // recipe.small_ratio)
    return round(small + share * (big - small))


def _resized(recipe: PretrainOptions, size: int) -> dict[str, Any]:
    return {**recipe.backbone, inner_size_name(backbone_config(recipe.backbone)): size}


def measure_all(options: DenseOptions, folder: Path, *, device: str = "cpu") -> list[dict[str, Any]]:
    """A row per text, model and share of big.

    Args:
        options: of the study.
        folder: the models, by name.
        device: where they are measured, see `duorl.devices`.

    Returns:
        Rows with `text`, `model`, `big_share`, `tokens`, `loss` (nats), `accuracy` (of the likeliest next token), and
        for the duo and the frozen one `rival` with the paired differences to it: the dense model of equal FLOPs,
        and the duo. Each number has its 95 % interval over files beside it.
    """
    tokenizer = load_tokenizer(folder / "duo")
    dense = {share: f"dense-{dense_size(options.recipe, share)}" for share in options.shares}
    models = {name: load(folder / name, device=device) for name in ("duo", "frozen", *dense.values())}
    rows = []
    for text in options.texts:
        windows = evaluation_windows(text, tokenizer, options)
        score = partial(_score, windows=windows.tokens, seed=options.seed)
        scores = {(name, share): score(models[name], 1.0) for share, name in dense.items()}
        for name in ("duo", "frozen"):
            scores |= {(name, share): score(models[name], share) for share in options.shares}
        for (name, share), found in scores.items():
            row = {"text": text, "model": name, "big_share": share, "tokens": windows.tokens[:, 1:].numel()}
            rival = {"duo": dense[share], "frozen": "duo"}.get(name)
            rows.append(
                {
                    **row,
                    **_summary(found, windows.files),
                    **_against(rival, found, scores.get((rival or "", share)), windows.files),
                }
            )
    return rows


def evaluation_windows(text: str, tokenizer: PreTrainedTokenizerBase, options: DenseOptions) -> Windows:
    """Windows of the measurement; errors as for `load_windows`."""
    found = read_windows(text.split(", "), tokenizer, split="evaluation", length=options.recipe.window)
    return found.first(options.windows)


def find(place: str | None, model: Path, texts: Sequence[str]) -> list[dict[str, Any]]:
    """The rows about some texts in a dense.json.

    Args:
        place: the file or its folder; by default the one in the model's folder.
        model: folder of the model.
        texts: names of the texts in the rows.

    Returns:
        The rows; empty if no place is given and the model's folder has no dense.json.

    Raises:
        FileNotFoundError: there is no dense.json at the place.
        ValueError: it has no rows about one of the texts.
    """
    path = Path(place) if place is not None else model / "dense.json"
    path = path / "dense.json" if path.is_dir() else path
    if not path.is_file():
        if place is None:
            return []
        raise FileNotFoundError(f"no dense.json at {place}: make one with duorl dense")
    rows = [row for row in json.loads(path.read_text())["rows"] if row["text"] in texts]
    missing = set(texts) - {row["text"] for row in rows}
    if missing and place is not None:
        raise ValueError(f"{path} says nothing of {min(missing)}: measure it with duorl dense --texts")
    return rows


def quick(folder: Path, texts: Mapping[str, Sequence[str]], seed: int, device: str = "auto") -> list[dict[str, Any]]:
    """The whole study in a minute, with very small models and very short trainings; only to show that it works.

    Args:
        folder: folder for the models.
        texts: sources by name; the models are trained on all of them.
        seed: seed of initial weights, order and routes.
        device: see `duorl.devices.TrainerDeviceOptions`.
    """
    sizes = {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 2}
    schedule = {"max_steps": 60, "per_device_train_batch_size": 8, "learning_rate": 4e-3, "warmup_steps": 5}
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
    recipe = PretrainOptions(
        out="",
        corpus=[source for names in texts.values() for source in names],
        backbone={"model_type": "llama", "tie_word_embeddings": True, **sizes},
        vocab_size=512,
        window=64,
        evaluation_windows=8,
        training={**schedule, **quiet},
        seed=seed,
    )
    named = tuple(", ".join(names) for names in texts.values())
    options = DenseOptions(recipe, shares=(0.0, 0.5, 1.0), texts=named, windows=64, seed=seed)
    for job in plan(recipe, options.shares, folder).values():
        if not (Path(job.out) / "history.json").is_file():  # written last
            Pretraining(job, device=device).train()
    return measure_all(options, folder, device=device)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table: accuracy, loss, and the paired difference of the accuracy to the rival."""
    head = ("text", "model", "share of big", "accuracy", "loss", "accuracy minus its rival's")
    lines = []
    for row in rows:
        low, high = row["accuracy_interval"]
        cells = [row["text"], row["model"], f"{row['big_share']:g}", f"{row['accuracy']:.3f} ({low:.3f}, {high:.3f})"]
        lines.append([*cells, f"{row['loss']:.3f}", _difference(row.get("rival"))])
    return grid(head, lines, numbers=(2, 3, 4))


def _difference(rival: Mapping[str, Any] | None) -> str:
    if rival is None:
        return ""
    low, high = rival["accuracy_interval"]
    return f"{rival['accuracy']:+.3f} ({low:+.3f}, {high:+.3f}), {rival['model']}"


@torch.no_grad()
def _score(model: DuoForCausalLM, share: float, *, windows: Tensor, seed: int) -> dict[str, Tensor]:
    """Mean loss and accuracy of each window, both (W,), with a random share of big decisions."""
    generator, parts = torch.Generator().manual_seed(seed), []
    for tokens in windows.to(model.device).split(16):
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        routes = random_routes(inputs.numel(), model.num_layers, big_share=share, generator=generator)
        logits = model(input_ids=inputs, routes=routes.view(*inputs.shape, -1).to(model.device)).logits
        losses = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        parts.append((losses.mean(1).cpu(), (logits.argmax(-1) == targets).float().mean(1).cpu()))
    return dict(zip(("loss", "accuracy"), map(torch.cat, zip(*parts, strict=True)), strict=True))


def _against(
    rival: str | None, found: dict[str, Tensor], other: dict[str, Tensor] | None, files: Tensor
) -> dict[str, Any]:
    if other is None:
        return {}
    return {"rival": {"model": rival, **_summary({name: found[name] - other[name] for name in found}, files)}}


def _summary(values: dict[str, Tensor], files: Tensor) -> dict[str, Any]:
    found = {name: estimate(per_window, files) for name, per_window in values.items()}
    means = {name: one.value for name, one in found.items()}
    return means | {f"{name}_interval": one.interval for name, one in found.items()}
