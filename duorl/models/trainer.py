"""The training loop of duo models: the Trainer of transformers, with an objective under random routing.

Stage 1 of Duo-LLM and the making of small networks both train with it. It has the Trainer's checkpoints, resuming and
several GPUs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.integrations.integration_utils import rewrite_logs

from duorl import ranks
from duorl.files import write_json
from duorl.models.modeling import DuoForCausalLM

Objective = Callable[[DuoForCausalLM, Tensor, torch.Generator], Tensor]
"""A loss, scalar, of a model on windows (B, T+1); it draws its routes from the generator."""

Measure = Callable[[DuoForCausalLM, Tensor], dict[str, float]]
"""Losses by name of a model on windows (W, T+1)."""


def random_routes(
    tokens: int, layers: int, *, skip_share: float = 0.0, big_share: float = 0.5, generator: torch.Generator
) -> Tensor:
    """A random route for every token, (tokens, layers) int64.

    In every layer, a share `skip_share` of the tokens skips, and a share `big_share` of the rest takes big. The tokens
    are random, their number is fixed: matrix kernels on a CPU are compiled for each shape. If the group sizes always
    change, this takes longer than the products.
    """
    skips = round(tokens * skip_share)
    smalls = int((tokens - skips) * (1 - big_share))
    counts = torch.tensor([skips, smalls, tokens - skips - smalls])
    shares = torch.arange(3).repeat_interleave(counts)
    return shares[torch.rand(tokens, layers, generator=generator).argsort(dim=0)]


_LOSSES = "losses.json"  # in a checkpoint: the losses since the last log


class WindowSet(Dataset):
    """Windows (W, T+1) as a data set of the Trainer."""

    def __init__(self, windows: Tensor):
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"tokens": self.windows[index]}


class RoutingTrainer(Trainer):
    """The Trainer of transformers, with an objective that draws new random routes of all tokens in every update.

    Batches that are accumulated into one update have the same random routes. A checkpoint also has the losses since the
    last log, so that a resumed training logs the same values as an uninterrupted one.

    Args:
        objective: the loss.
        measure: losses on the evaluation windows.
    """

    objective: Objective
    measure: Measure

    def __init__(self, model: DuoForCausalLM, *args, objective: Objective, measure: Measure, **kwargs):
        cached = model.config.use_cache
        super().__init__(model, *args, **kwargs)
        model.config.use_cache = cached  # the Trainer turns it off, and a saved model would generate slowly
        self.model_accepts_loss_kwargs = False  # the loss is a mean, so accumulated batches are averaged
        self.objective, self.measure = objective, measure
        # Objectives call parts of the model, where wrapped models would not notice; see `training_step`.
        self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)
        self.pop_callback(PrinterCallback)  # it prints dictionaries between the lines of a command
        self.add_callback(_GoesOn(self))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The objective; the step is the seed, so a resumed run draws the same routes."""
        seed = (self.args.seed * 1_000_003 + self.state.global_step) * 1009
        loss = self.objective(model, inputs["tokens"], torch.Generator().manual_seed(seed))
        return (loss, {}) if return_outputs else loss

    def training_step(self, model, *args, **kwargs) -> Tensor:
        """Add the gradients of one batch; after the last batch of an update they are averaged over ranks."""
        loss = super().training_step(model, *args, **kwargs)
        if self.accelerator.sync_gradients:
            ranks.average_gradients(weight for weight in model.parameters() if weight.requires_grad)
        return loss

    def log(self, logs, start_time=None) -> None:
        """Log; the mean loss of the training includes the steps before it was stopped."""
        if "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, start_time)

    def _save_checkpoint(self, model, trial) -> None:
        losses = {
            "total": self._total_loss_scalar,
            "since": self._tr_loss.item(),
            "logged": self._globalstep_last_logged,
        }
        if ranks.first():
            write_json(Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}" / _LOSSES, losses)
        super()._save_checkpoint(model, trial)  # writes trainer_state.json last

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """The losses of `measure` on the evaluation windows."""
        windows: Tensor = self.eval_dataset.windows  # type: ignore[union-attr]
        found = self.measure(self.accelerator.unwrap_model(self.model), windows)
        metrics = {f"{metric_key_prefix}_{name}": loss for name, loss in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def run(self, folder: Path, callbacks: Sequence[TrainerCallback] = (), *, resume: bool = False) -> dict[str, float]:
        """Train and evaluate; TensorBoard events, if wanted, go to `folder / "tensorboard"`.

        Args:
            folder: folder of the training; the checkpoints are where the Trainer's arguments say.
            callbacks: further callbacks of the Trainer.
            resume: continue from the last checkpoint, if there is one.

        Returns:
            What `measure` finds at the end.
        """
        checkpoint = last_checkpoint(Path(str(self.args.output_dir))) if resume else None
        self._journal(folder / "tensorboard", checkpoint)
        ranks.wait()  # until all have found the checkpoint
        for callback in callbacks:
            self.add_callback(callback)
        self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        found = self.evaluate()
        return {name.removeprefix("eval_"): found[name] for name in found if name.startswith("eval_")}

    def _journal(self, place: Path, checkpoint: Path | None) -> None:
        """Write TensorBoard events, if wanted: first those from before the checkpoint."""
        if self.pop_callback(TensorBoardCallback) is None or not ranks.first():
            return
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(place, ignore_errors=True)
        writer = SummaryWriter(str(place))
        state = json.loads((checkpoint / "trainer_state.json").read_text()) if checkpoint else {"log_history": []}
        for logs in state["log_history"]:
            step = logs.pop("step")
            for tag, value in rewrite_logs(logs).items():
                writer.add_scalar(tag, value, step)
        self.add_callback(_Events(writer))


class _GoesOn(TrainerCallback):
    """Gives a resumed trainer the losses in its checkpoint."""

    def __init__(self, trainer: RoutingTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Set the losses; the trainer has just set them to 0."""
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / _LOSSES
        if state.global_step and path.is_file():
            losses = json.loads(path.read_text())
            self.trainer._total_loss_scalar = losses["total"]
            self.trainer._tr_loss += losses["since"]
            self.trainer._globalstep_last_logged = losses["logged"]


class _Events(TensorBoardCallback):
    """TensorBoard events that stay open after the training, for the evaluation."""

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Flush, but do not close."""
        self.tb_writer.flush()


def last_checkpoint(folder: Path) -> Path | None:
    """The last complete checkpoint in a folder; those without trainer_state.json are incomplete and removed."""
    whole: dict[int, Path] = {}
    for checkpoint in folder.glob("checkpoint-*"):
        try:
            whole[json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]] = checkpoint
        except (OSError, ValueError, KeyError):
            shutil.rmtree(checkpoint)
    return whole[max(whole)] if whole else None
