"""`duorl pretrain`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from duorl.experiments.trainings import finish_all
from duorl.experiments.voice import say
from duorl.models.pretrain import Pretraining
from duorl.models.recipe import PretrainOptions
from duorl.runs.jobs import InProcess, Job, Tell
from duorl.runs.pretraining import run


def prepare(options: Namespace, config: dict[str, Any]) -> tuple[str, Callable[[Path], None]]:
    """The folder, and the function that trains the model in it; see `Pretraining` for the errors."""
    fields = {name: getattr(options, name) for name in PretrainOptions.__dataclass_fields__}
    where = {"device": options.device, "dtype": options.dtype}
    prepared = Pretraining(PretrainOptions(**fields), resume=options.resume, **where)

    def work(folder: Path) -> None:
        def function(tell: Tell) -> dict:
            return run(prepared, tell)

        finish_all([Job("pretrain", folder, function)], InProcess(), folder)
        say(f"wrote {folder}/: load it with --model {folder}")

    return "pretrain", work
