"""The three stages that make small networks, one after the other; each can be stopped and continued.

    making = Making(model, options, training, held_out)
    making.run(folder)

A finished stage leaves `stages/NAME.safetensors` in the folder. A stage in progress has checkpoints of the Trainer.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

from duorl.files import write_json, writing
from duorl.models.families import family_of
from duorl.models.modeling import DuoForCausalLM
from duorl.models.trainer import Objective, RoutingTrainer, WindowSet
from duorl.smalls.choose import choose
from duorl.smalls.objectives import Distil, held_out_losses, regress
from duorl.smalls.recipe import STAGES, ConvertOptions, DistilOptions, RegressOptions, Stage

_WEIGHTS = "model.safetensors"  # in a checkpoint, where the Trainer looks for it
_WARM_UP = 0.05  # of the updates

Progress = Callable[..., None]
"""Called with completed=, total=, note=."""


def small_weights(model: DuoForCausalLM) -> dict[str, Tensor]:
    """The weights of the small networks, by their names in the model."""
    own = f".{family_of(model.config.backbone).ffn}.small."
    return {name: weight for name, weight in model.named_parameters() if own in name}


def take_small_weights(model: DuoForCausalLM, path: Path) -> None:
    """Load the weights of the small networks from a file."""
    kept, own = load_file(path), small_weights(model)
    if kept.keys() != own.keys():
        raise ValueError(f"{path} holds the small networks of another model")
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(kept[name])


class SmallTrainer(RoutingTrainer):
    """Trains the small networks only, and keeps only these in its checkpoints."""

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file(small_weights(self.accelerator.unwrap_model(self.model)), folder / _WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        take_small_weights(self.accelerator.unwrap_model(self.model), Path(resume_from_checkpoint) / _WEIGHTS)


class Making:
    """Makes the small networks of a model, in place.

    Args:
        model: a duo model with new small networks. Its big networks are frozen. In bfloat16 or float16 it computes in
            this precision, and the small networks are trained in float32.
        options: see `ConvertOptions`.
        training: (W, T+1), text to learn from.
        held_out: (W, T+1), text for the losses after and during the stages.

    Raises:
        ValueError: the text is shorter than an update.
    """

    def __init__(self, model: DuoForCausalLM, options: ConvertOptions, training: Tensor, held_out: Tensor):
        self.model, self.options = model, options
        self.training, self.held_out = training, held_out[: options.evaluation_windows]
        model.requires_grad_(False).eval()
        for ffn in model.stack.ffns:
            ffn.small.float().requires_grad_(True)

    def cost(self, stage: Stage) -> tuple[int, float]:
        """Tokens that a stage reads, and its approximate FLOPs."""
        window, parts = self.options.window, self.model.flops
        small, big = (parts.token(torch.tensor(share), window).item() for share in (0.0, 1.0))
        if stage == "choose":
            return self._windows() * window, 2 * (big - parts.head) * self._windows() * window
        tokens = self._updates(stage) * self._batch(stage) * window
        if stage == "regress":
            return tokens, (big - parts.head + 3 * (small - parts.head)) * tokens
        return tokens, (big + 3 * (small + big) / 2) * tokens

    def _options(self, stage: Stage) -> RegressOptions | DistilOptions:
        return self.options.regress if stage == "regress" else self.options.distil

    def _windows(self) -> int:
        return min(max(1, self.options.choose.tokens // self.options.window), len(self.training))

    def _batch(self, stage: Stage) -> int:
        return max(1, self._options(stage).tokens_per_update // self.options.window)

    def _updates(self, stage: Stage) -> int:
        return max(1, self._options(stage).tokens // (self._batch(stage) * self.options.window))

    def run(self, folder: Path, tell: Progress, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, dict]:
        """Run the stages that are not finished in this folder.

        Args:
            folder: place of the stages.
            tell: called after every pass or update.
            callbacks: callbacks of the Trainer, for checkpoints and signals.

        Returns:
            By stage, the losses on the held-out windows.
        """
        losses = {}
        for stage in self.options.stages:
            kept = folder / "stages" / f"{stage}.safetensors"
            if kept.is_file():
                take_small_weights(self.model, kept)
            else:
                self._run(stage, folder, tell, callbacks)
                with writing(kept) as beside:
                    save_file(small_weights(self.model), beside)
                shutil.rmtree(folder / "stages" / stage, ignore_errors=True)
            losses[stage] = self._measured(stage, folder)
        return losses

    def _measured(self, stage: Stage, folder: Path) -> dict[str, float]:
        found = held_out_losses(self.model, self.held_out)
        write_json(folder / "stages" / f"{stage}.json", found)
        return found

    def _run(self, stage: Stage, folder: Path, tell: Progress, callbacks: Sequence[TrainerCallback]) -> None:
        if stage == "choose":
            windows, read = self.training[: self._windows()], 0

            def step(tokens: int) -> None:
                nonlocal read
                read += tokens
                tell(completed=read, total=2 * windows[:, 1:].numel(), note=stage)

            return choose(self.model, windows, tell=step)
        objective: Objective = regress if stage == "regress" else Distil(self.options.distil.target)
        trainer = SmallTrainer(
            model=self.model,
            args=self._arguments(stage, folder / "stages" / stage),
            train_dataset=WindowSet(self.training),
            eval_dataset=WindowSet(self.held_out),
            objective=objective,
            measure=held_out_losses,
        )
        trainer.run(folder / "tensorboard" / stage, callbacks, resume=True)
        write_json(folder / "stages" / f"{stage}-history.json", trainer.state.log_history)
        return None

    def _arguments(self, stage: Stage, checkpoints: Path) -> TrainingArguments:
        updates = self._updates(stage)
        return TrainingArguments(
            output_dir=str(checkpoints),
            max_steps=updates,
            per_device_train_batch_size=self._batch(stage),
            learning_rate=self._options(stage).learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=round(_WARM_UP * updates),
            weight_decay=0.0,
            logging_steps=max(1, updates // 100),
            eval_strategy="steps",
            eval_steps=max(1, updates // 10),
            save_strategy="no",  # a callback saves every few minutes
            save_total_limit=2,
            seed=self.options.seed + STAGES.index(stage),
            use_cpu=self.model.device.type == "cpu",
            remove_unused_columns=False,
            disable_tqdm=True,
            report_to="tensorboard",
        )
