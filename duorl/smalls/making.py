"""The three stages that make small networks, each a job that can be stopped and continued.

making = Making(model, options, training, held_out)
making.run("choose", folder / "choose", tell)
making.run("regress", folder / "regress", tell, after=folder / "choose")
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

from duorl import ranks
from duorl.corpus import spread
from duorl.files import write_json, writing
from duorl.models.footprint import Batch, Keeps, require_room
from duorl.models.modeling import DuoForCausalLM
from duorl.models.shared import WEIGHTS, small_weights, take_small
from duorl.models.trainer import Objective, RoutingTrainer, WindowSet
from duorl.smalls.choose import BATCH, choose, last_map, sum_bytes
from duorl.smalls.objectives import Distil, held_out_losses, regress
from duorl.smalls.recipe import STAGES, ConvertOptions, DistilOptions, RegressOptions, Stage
from duorl.smalls.recording import big_passes

_TRAINERS = "model.safetensors"  # where the Trainer looks for weights in a checkpoint
_WARM_UP = 0.05  # of the updates
_KEEPS: dict[Stage, Keeps] = {"choose": "nothing", "regress": "errors", "distil": "everything"}
_LEARNING = 3 * 4  # bytes per weight that learns: its derivative and two moments of AdamW in float32

Progress = Callable[..., None]
"""Called with completed=, total=, note=."""


class SmallTrainer(RoutingTrainer):
    """Trains the small networks only, beside a model in evaluation mode, and keeps only these in its checkpoints."""

    def compute_loss(self, model, *args, **kwargs):
        """The objective without dropout, which the Trainer has just switched on: big networks are not trained."""
        return super().compute_loss(model.eval(), *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file(small_weights(self.accelerator.unwrap_model(self.model)), folder / _TRAINERS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        take_small(self.accelerator.unwrap_model(self.model), Path(resume_from_checkpoint) / _TRAINERS)


class Making:
    """Makes the small networks of a model, in place.

    Args:
        model: a duo model with new small networks. Its big networks are frozen. In bfloat16 or float16 it computes in
            this precision, and the small networks are trained in float32.
        options: see `ConvertOptions`.
        training: (W, T+1), text to learn from.
        held_out: (W, T+1), text for the losses after and during the stages.

    Raises:
        ValueError: the text is shorter than an update, a network has no single last map, its output is not finite, or
            a stage does not fit into memory.
    """

    def __init__(self, model: DuoForCausalLM, options: ConvertOptions, training: Tensor, held_out: Tensor):
        self.model, self.options = model, options
        order = torch.randperm(len(training), generator=torch.Generator().manual_seed(options.seed))
        self.training = training[order]  # so the windows that `choose` records are of all texts
        self.held_out = spread(held_out, options.evaluation_windows)
        model.requires_grad_(False).eval()
        for ffn in model.stack.ffns:
            ffn.small.float().requires_grad_(True)
            last_map(ffn)
        needed = max(self._batch(stage) for stage in STAGES[1:])
        if len(training) < needed:
            raise ValueError(f"the text gives {len(training)} windows, but an update takes {needed}: give more text")
        for stage in options.stages:
            self._require_room(stage)
            if stage != "choose" and self._batch(stage) % ranks.count():
                windows = f"--{stage}.tokens_per_update gives {self._batch(stage)} windows"
                raise ValueError(f"{windows}, which {ranks.count()} ranks cannot share: give a multiple")
        for _ in big_passes(model, training[:1].to(model.device)):
            pass

    def _require_room(self, stage: Stage) -> None:
        """Refuse a stage that does not fit into memory."""
        if stage == "choose":
            windows, fix, beside = BATCH, f"lower --window ({self.options.window})", sum_bytes(self.model)
        else:
            windows = self._batch(stage)
            fix = f"lower --{stage}.tokens_per_update ({self._options(stage).tokens_per_update})"
            beside = _LEARNING * sum(weight.numel() for weight in self.model.parameters() if weight.requires_grad)
        require_room(self.model, Batch(windows, self.options.window, _KEEPS[stage]), fix, beside)

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

    def run(
        self,
        stage: Stage,
        place: Path,
        tell: Progress,
        *,
        after: Path | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> dict[str, float]:
        """Run one stage, from its last checkpoint if there is one.

        Args:
            stage: its name.
            place: its folder, in which it leaves `small.safetensors`.
            tell: called after every pass or update.
            after: the folder of the stage before it.
            callbacks: callbacks of the Trainer, for checkpoints and signals.

        Returns:
            The losses on the held-out windows.

        Raises:
            ValueError: the small networks are no numbers after it.
        """
        if after is not None:
            take_small(self.model, after / WEIGHTS)
        if stage == "choose":
            self._choose(tell)
            losses = held_out_losses(self.model, self.held_out)
        else:
            losses = self._train(stage, place, callbacks)
        weights = small_weights(self.model)
        if not all(weight.isfinite().all() for weight in weights.values()):
            raise ValueError(f"the small networks hold numbers that are not finite: lower --{stage}.learning_rate")
        if ranks.first():
            with writing(place / WEIGHTS) as beside:
                save_file(weights, beside)
        return losses

    def _choose(self, tell: Progress) -> None:
        windows, read = self.training[: self._windows()], 0

        def step(tokens: int) -> None:
            nonlocal read
            read += tokens
            tell(completed=read, total=2 * windows[:, 1:].numel())

        choose(self.model, windows, tell=step)

    def _train(self, stage: Stage, place: Path, callbacks: Sequence[TrainerCallback]) -> dict[str, float]:
        objective: Objective = regress if stage == "regress" else Distil(self.options.distil.target)
        trainer = SmallTrainer(
            model=self.model,
            args=self._arguments(stage, place / "checkpoints"),
            train_dataset=WindowSet(self.training),
            eval_dataset=WindowSet(self.held_out),
            objective=objective,
            measure=held_out_losses,
        )
        losses = trainer.run(place, callbacks, resume=True)
        if ranks.first():
            write_json(place / "history.json", trainer.state.log_history)
            shutil.rmtree(place / "checkpoints", ignore_errors=True)
        return losses

    def _arguments(self, stage: Stage, checkpoints: Path) -> TrainingArguments:
        updates = self._updates(stage)
        return TrainingArguments(
            output_dir=str(checkpoints),
            max_steps=updates,
            per_device_train_batch_size=self._batch(stage) // ranks.count(),
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
