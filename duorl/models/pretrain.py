"""Stage 1 of Duo-LLM: train a duo model under random routing.

For every token and layer a coin sends the token to the big or to the small network, which keeps the two
interchangeable and unbiased by any router (arXiv 2410.10846, section on training the duo). The loop is
transformers' Trainer, so checkpoints, resuming and several GPUs come with it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint, set_seed

from duorl.corpus import documents, load_windows, source_names
from duorl.costs import BIG, SMALL
from duorl.models.card import write_card
from duorl.models.config import DuoConfig, inner_size
from duorl.models.conversion import convert
from duorl.models.loading import load
from duorl.models.modeling import DuoForCausalLM
from duorl.models.tokenizer import train_tokenizer


@dataclass(frozen=True)
class PretrainOptions:
    """What stage 1 trains, and on what.

    Args:
        out: folder for the model, its tokenizer, checkpoints and TensorBoard events.
        corpus: built-in corpora, or paths and globs of .txt, .jsonl and .parquet files.
        model: folder of a model to go on from, with its tokenizer: a duo, or a Hugging Face causal language model,
            which is converted; its own networks become the big ones. Unless given, a model is built from `backbone`.
        backbone: a transformers configuration as a dictionary with `model_type`.
        vocab_size: tokens of the byte-level BPE that is trained for a model built from `backbone`.
        small_ratio: inner size of the big network divided by that of the small one (the paper: 16).
        window: tokens to predict per window.
        skip_share: share of decisions that skip (the paper: 0).
        big_share: share of big among the others (the paper: 0.5); 1 trains a dense model, whose small networks stay
            as they are.
        trained: `all` weights, or only the `small` networks, beside a model that stays as it is (Duo-LLM, Fig. 8c).
        evaluation_windows: windows of the router split on which all-big and all-small are followed.
        training: options of transformers' TrainingArguments.
        seed: of initialisation, order of the text and routes.
    """

    out: str
    corpus: list[str] | str = field(default_factory=lambda: ["stdlib-code", "stdlib-docs"])
    model: str | None = None
    backbone: dict[str, Any] = field(default_factory=lambda: {"model_type": "llama"})
    vocab_size: int = 2048
    small_ratio: int = 16
    window: int = 256
    skip_share: float = 0.0
    big_share: float = 0.5
    trained: Literal["all", "small"] = "all"
    evaluation_windows: int = 64
    training: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("skip_share", "big_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], not {getattr(self, name)}")
        if self.trained == "small" and self.model is None:
            raise ValueError("trained 'small' leaves all else as it is: give the model to start from")


def random_routes(
    tokens: int, layers: int, *, skip_share: float = 0.0, big_share: float = 0.5, generator: torch.Generator
) -> Tensor:
    """A random route for every token, (tokens, layers) int64.

    In every layer a share `skip_share` skips, and `big_share` of the rest takes big. Which tokens do is
    random, how many is not: a processor's matrix kernels are compiled per shape, so group sizes that
    change with every coin toss cost more than the products themselves.
    """
    skips = round(tokens * skip_share)
    smalls = int((tokens - skips) * (1 - big_share))
    counts = torch.tensor([skips, smalls, tokens - skips - smalls])
    shares = torch.arange(3).repeat_interleave(counts)
    return shares[torch.rand(tokens, layers, generator=generator).argsort(dim=0)]


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of logits (B, T, V) against targets (B, T)."""
    return cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


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


class _Windows(Dataset):
    def __init__(self, windows: Tensor):
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"tokens": self.windows[index]}


class StageOneTrainer(Trainer):
    """transformers' Trainer with a fresh random route for every token at every update.

    Batches that are accumulated into one update share the draw of their routes.
    """

    def __init__(self, *args, skip_share: float, big_share: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # the loss is a mean, so accumulated batches are averaged
        self.shares = {"skip_share": skip_share, "big_share": big_share}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Next-token loss in nats under random routes, seeded by the step so that a resumed run draws the same."""
        tokens = inputs["tokens"]
        seed = (self.args.seed * 1_000_003 + self.state.global_step) * 1009 + self.args.process_index
        generator = torch.Generator().manual_seed(seed)
        inputs, layers = tokens[:, :-1], self.accelerator.unwrap_model(model).num_layers
        routes = random_routes(inputs.numel(), layers, **self.shares, generator=generator)
        output = model(input_ids=inputs, routes=routes.view(*inputs.shape, layers).to(inputs.device))
        loss = next_token_loss(output.logits, tokens[:, 1:])
        return (loss, output) if return_outputs else loss

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Mean loss in nats of all-small and all-big on the evaluation windows."""
        model = self.accelerator.unwrap_model(self.model)
        windows = cast(_Windows, self.eval_dataset).windows
        found = constant_losses(model, windows, batch=self.args.eval_batch_size)
        metrics = {f"{metric_key_prefix}_{name}": loss for name, loss in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def backbone_config(settings: dict[str, Any], **more: Any) -> PreTrainedConfig:
    """A transformers configuration from a dictionary with `model_type`.

    Raises:
        ValueError: it names no known family.
    """
    if "model_type" not in settings:
        raise ValueError("backbone must name a transformers family as model_type, e.g. llama")
    settings = {**settings, **more}
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def build(options: PretrainOptions) -> tuple[DuoForCausalLM, PreTrainedTokenizerBase]:
    """The untrained duo model and its tokenizer.

    Raises:
        ValueError: the model cannot be converted, or `backbone` names no known family.
    """
    set_seed(options.seed)
    if options.model is not None:
        model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        if not isinstance(model, DuoForCausalLM):
            model = convert(model, small_ratio=options.small_ratio)
        if options.trained == "small":
            model.requires_grad_(False)
            for ffn in model.stack.ffns:
                ffn.small.requires_grad_(True)
        return model, AutoTokenizer.from_pretrained(options.model)
    texts = (document.text for document in documents(options.corpus, "model"))
    tokenizer = train_tokenizer(texts, options.vocab_size)
    if options.small_ratio < 1:
        raise ValueError(f"small_ratio must be at least 1, not {options.small_ratio}")
    backbone = backbone_config(
        options.backbone,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    small_size = max(1, inner_size(backbone) // options.small_ratio)
    return DuoForCausalLM(DuoConfig(backbone=backbone, small_size=small_size)), tokenizer


class Pretraining:
    """A stage-1 training, ready to run: its input has been read and found good.

    Args:
        options: see `PretrainOptions`.
        resume: go on from the last checkpoint in the folder.

    Raises:
        ValueError: text is too short, the model cannot be converted, an option of `training` is unknown, or
            there is no checkpoint to resume.
        FileNotFoundError: text is missing.
    """

    def __init__(self, options: PretrainOptions, *, resume: bool = False):
        self.out = Path(options.out)
        checkpoints = self.out / "checkpoints"
        self.checkpoint = get_last_checkpoint(str(checkpoints)) if resume and checkpoints.is_dir() else None
        if resume and self.checkpoint is None:
            raise ValueError(f"no checkpoint in {checkpoints}: start without --resume")
        known = {field.name for field in fields(TrainingArguments)}
        if unknown := sorted(set(options.training) - known):
            raise ValueError(f"training: transformers.TrainingArguments has no option {unknown[0]!r}")
        self.options = options
        self.model, self.tokenizer = build(options)
        read = partial(load_windows, options.corpus, self.tokenizer, length=options.window)
        self.arguments = _training_arguments(options, self.out)
        self.training, self.held_out = read(split="model"), read(split="router")
        self.evaluation = {
            source: load_windows(source, self.tokenizer, split="evaluation", length=options.window)
            for source in source_names(options.corpus)
        }

    def run(self) -> None:
        """Train, save, and leave a model card, `README.md`, with losses on the evaluation split."""
        self.train()
        describe(self.options, self.out, self.arguments, self.evaluation)

    def train(self) -> None:
        """Train, and save under `options.out`: `config.json`, `model.safetensors` (bfloat16), the tokenizer's files,
        and last `history.json`, the Trainer's log.
        """
        trainer = StageOneTrainer(
            model=self.model,
            args=self.arguments,
            train_dataset=_Windows(self.training),
            eval_dataset=_Windows(self.held_out[: self.options.evaluation_windows]),
            skip_share=self.options.skip_share,
            big_share=self.options.big_share,
        )
        trainer.train(resume_from_checkpoint=self.checkpoint)
        trainer.evaluate()
        save(self.model, self.tokenizer, self.out)
        (self.out / "history.json").write_text(json.dumps(trainer.state.log_history, indent=1))


def _training_arguments(options: PretrainOptions, out: Path) -> TrainingArguments:
    # Without use_cpu the arguments refuse bf16 where there is no GPU, though CPUs autocast to it as well.
    defaults = {"use_cpu": not torch.cuda.is_available(), "seed": options.seed, "remove_unused_columns": False}
    return TrainingArguments(output_dir=str(out / "checkpoints"), **{**defaults, **options.training})


def describe(options: PretrainOptions, out: Path, arguments: TrainingArguments, evaluation: dict[str, Tensor]) -> None:
    """Write the model card of a trained model; its losses are those of the model as saved, on windows by text."""
    model = load(out)
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


def save(model: DuoForCausalLM, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Write the model in bfloat16, half of float32's bytes, and its tokenizer."""
    nn.Module.to(model, dtype=torch.bfloat16)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
