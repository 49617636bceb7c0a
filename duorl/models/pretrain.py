"""Stage 1 of Duo-LLM: train a duo model under random routing.

For every token and layer, the big or the small network is chosen at random. So both networks can replace each other,
and no router influences them (arXiv 2410.10846, section on training the duo). The training loop is the Trainer of
transformers, with its checkpoints, resuming and several GPUs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import set_seed

from duorl import ranks
from duorl.corpus import documents, load_windows, source_names
from duorl.costs import BIG, SMALL
from duorl.devices import Dtype, pick_trainers_device
from duorl.files import write_json
from duorl.models.bases import said
from duorl.models.card import write_card
from duorl.models.config import DuoConfig
from duorl.models.conversion import convert
from duorl.models.families import inner_size, small_size
from duorl.models.gateway import load_model
from duorl.models.loading import check_windows, load, load_tokenizer
from duorl.models.modeling import DuoForCausalLM
from duorl.models.recipe import PretrainOptions
from duorl.models.saving import precisions, round_weights, save
from duorl.models.tokenizer import train_tokenizer
from duorl.models.trainer import RoutingTrainer, WindowSet, random_routes
from duorl.models.training_options import in_precision, training_arguments


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of logits (B, T, V) against targets (B, T)."""
    return cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


@dataclass(frozen=True)
class NextToken:
    """The objective of stage 1: next-token loss in nats under random routes; see `random_routes` for the shares."""

    skip_share: float
    big_share: float

    def __call__(self, model: DuoForCausalLM, tokens: Tensor, generator: torch.Generator) -> Tensor:
        """The loss of windows (B, T+1), scalar."""
        inputs, layers = tokens[:, :-1], getattr(model, "module", model).num_layers  # may be wrapped for several GPUs
        routes = ranks.own(random_routes(ranks.count() * inputs.numel(), layers, **vars(self), generator=generator))
        logits = model(input_ids=inputs, routes=routes.view(*inputs.shape, layers).to(inputs.device)).logits
        return next_token_loss(logits, tokens[:, 1:])


@torch.no_grad()
def constant_losses(model: DuoForCausalLM, windows: Tensor, *, batch: int = 32) -> dict[str, float]:
    """Mean loss in nats of `all_small` and `all_big` on windows (W, T+1)."""
    model.eval()
    losses = {}
    for name, action in (("all_small", SMALL), ("all_big", BIG)):
        total = 0.0
        for tokens in windows.to(model.device).split(batch):
            inputs = tokens[:, :-1]
            routes = torch.full((*inputs.shape, model.num_layers), action, device=model.device)
            total += next_token_loss(model(input_ids=inputs, routes=routes).logits, tokens[:, 1:]).item() * len(tokens)
        losses[name] = total / len(windows)
    return losses


def backbone_config(settings: dict[str, Any], **more: Any) -> PreTrainedConfig:
    """A transformers configuration from a dictionary with `model_type`.

    Raises:
        ValueError: it names no known family, or no precision as `dtype`.
    """
    if not isinstance(getattr(torch, str(settings.get("dtype") or "bfloat16"), None), torch.dtype):
        raise ValueError(f"backbone names {settings['dtype']!r} as dtype: choose float32, bfloat16 or float16")
    if "model_type" not in settings:
        raise ValueError("backbone must name a transformers family as model_type, e.g. llama")
    settings = {**settings, **more}
    try:
        return AutoConfig.for_model(settings.pop("model_type"), **settings)
    except Exception as error:  # each family checks its own options, in its own way
        raise ValueError(f"backbone: {said(error)}") from error


def build(options: PretrainOptions) -> tuple[DuoForCausalLM, PreTrainedTokenizerBase]:
    """The untrained duo model, in float32, and its tokenizer.

    Raises:
        ValueError: the model cannot be converted, or `backbone` names no known family.
    """
    set_seed(options.seed)
    if options.model is not None:
        model: Any = load_model(options.model, dtype=torch.float32)
        if not isinstance(model, DuoForCausalLM):
            model = convert(model, small_ratio=options.small_ratio)
        if options.trained == "small":
            model.requires_grad_(False)
            for ffn in model.stack.ffns:
                ffn.small.requires_grad_(True)
        return _told_of_padding(model, load_tokenizer(options.model))
    texts = (document.text for document in documents(options.corpus, "model"))
    tokenizer = train_tokenizer(texts, options.vocab_size)
    backbone = backbone_config(
        options.backbone,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype=None,
    )
    config = DuoConfig(backbone=backbone, small_size=small_size(backbone, options.small_ratio))
    return _told_of_padding(DuoForCausalLM(config), tokenizer)


def _told_of_padding(
    model: DuoForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> tuple[DuoForCausalLM, PreTrainedTokenizerBase]:
    """Both, the model generating with the tokenizer's padding token where it has none of its own.

    Its configuration is not told: transformers would not train that token's embedding, which may be the end of text's.
    """
    if model.generation_config is not None and model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


class Pretraining:
    """A stage-1 training with checked input, ready to run.

    Args:
        options: see `PretrainOptions`.
        resume: continue from the last checkpoint in the folder, if there is one.
        device, dtype: see `duorl.devices.TrainerDeviceOptions`.

    Raises:
        ValueError: text is too short, the model cannot be converted, an option of `training` is unknown, or the device
            is not there or has not this precision.
        FileNotFoundError: text is missing.
    """

    def __init__(self, options: PretrainOptions, *, resume: bool = False, device: str = "auto", dtype: Dtype = "auto"):
        self.out = Path(options.out)
        self.resume = resume
        self.options = options
        self.device, self.dtype = pick_trainers_device(device), dtype
        self.arguments = self._arguments(self.out)
        if options.model is not None and not Path(options.model).is_dir():
            raise FileNotFoundError(f"no model in {options.model}: give a folder")
        self.model, self.tokenizer = build(options)
        fresh: Any = backbone_config(options.backbone).dtype or torch.bfloat16  # half of float32's bytes
        self.precisions = precisions(self.model, options.model, fresh)
        read = partial(load_windows, options.corpus, self.tokenizer, length=options.window)
        self.training, self.held_out = read(split="model"), read(split="router")
        self.evaluation = {
            source: load_windows(source, self.tokenizer, split="evaluation", length=options.window)
            for source in source_names(options.corpus)
        }
        for windows in (self.training, self.held_out, *self.evaluation.values()):
            check_windows(self.model, windows)
        self._try()

    def _try(self) -> None:
        """Make what trains, once, and draw a batch: what cannot be made is found before anything is written."""
        with TemporaryDirectory() as folder:
            try:
                trainer = self._trainer(self._arguments(Path(folder)))
                trainer.create_optimizer_and_scheduler(1)
                next(iter(trainer.get_train_dataloader()))
            except Exception as error:  # of many kinds, for the options are
                raise ValueError(f"training: {type(error).__name__}: {error}") from error

    def _arguments(self, out: Path) -> TrainingArguments:
        # Without use_cpu, the arguments refuse bf16 if there is no GPU, although CPUs support it.
        defaults = {"use_cpu": self.device.type == "cpu", "seed": self.options.seed, "remove_unused_columns": False}
        given = in_precision(self.options.training, self.dtype)
        return training_arguments(given, output_dir=str(out / "checkpoints"), save_total_limit=2, **defaults)

    def _trainer(self, arguments: TrainingArguments) -> RoutingTrainer:
        return RoutingTrainer(
            model=self.model,
            args=arguments,
            train_dataset=WindowSet(self.training),
            eval_dataset=WindowSet(self.held_out[: self.options.evaluation_windows]),
            objective=NextToken(self.options.skip_share, self.options.big_share),
            measure=partial(constant_losses, batch=arguments.eval_batch_size),
        )

    def run(self, callbacks: Sequence[TrainerCallback] = ()) -> None:
        """Train, save, and write a model card, `README.md`, with losses on the evaluation split."""
        self.train(callbacks)
        if ranks.first():
            describe(self.options, self.out, self.arguments, self.evaluation)

    def train(self, callbacks: Sequence[TrainerCallback] = ()) -> None:
        """Train, and save under `options.out`: `config.json`, `model.safetensors` (its precision: see
        `duorl.models.saving`), the tokenizer's files, and last `history.json`, the Trainer's log.

        Args:
            callbacks: callbacks of the Trainer.
        """
        trainer = self._trainer(self.arguments)
        trainer.run(self.out, callbacks, resume=self.resume)
        if not ranks.first():
            return
        round_weights(self.model, self.precisions)
        save(self.model, self.tokenizer, self.out)
        write_json(self.out / "history.json", trainer.state.log_history)


def describe(options: PretrainOptions, out: Path, arguments: TrainingArguments, evaluation: dict[str, Tensor]) -> None:
    """Write the model card of a trained model, with losses of the saved model on windows by text."""
    model = load(out, device=arguments.device.type)
    losses = {
        source: {"tokens": windows[:, 1:].numel(), **constant_losses(model, windows)}
        for source, windows in evaluation.items()
    }
    backbone, last = model.config.backbone, json.loads((out / "history.json").read_text())[-1]
    start = "from random initialisation" if options.model is None else f"from {options.model}"
    facts = {
        "name": out.name,
        "start": start if options.trained == "all" else f"in its small networks alone {start}",
        "family": backbone.model_type,
        "big": inner_size(backbone),
        "small": model.config.small_size,
        "corpus": ", ".join(source_names(options.corpus)),
        "command": "duorl pretrain --config config.yaml",
        "layers": model.num_layers,
        "hidden": model.hidden_size,
        "vocabulary": backbone.vocab_size,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": last["step"],
        "epochs": last["epoch"],
        "batch": arguments.train_batch_size * arguments.gradient_accumulation_steps * options.window,
        "skip": options.skip_share,
        "big_share": options.big_share,
        "window": options.window,
        "windows": options.evaluation_windows,
    }
    write_card(out, facts=facts, losses=losses)
