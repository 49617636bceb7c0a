"""`duorl dense`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from rich.markdown import Markdown

from duorl.experiments.trainings import Workers
from duorl.experiments.voice import command, say, show
from duorl.files import write_json, write_text
from duorl.models.pretrain import Pretraining
from duorl.paper import dense
from duorl.paper.dense import DenseOptions
from duorl.runs.jobs import Job
from duorl.runs.pretraining import pretrain


def prepare(options: Namespace, config: dict[str, Any]) -> tuple[str, Callable[[Path], None]]:
    """The default name of the folder, and the function that trains and measures the models in it.

    Raises:
        ValueError, OSError: the recipe or a text cannot be used.
    """
    settings = DenseOptions(**{name: getattr(options, name) for name in DenseOptions.__dataclass_fields__})
    first = dense.plan(settings.recipe, settings.shares, Path())["duo"]
    where = {"device": options.device, "dtype": options.dtype}
    duo = Pretraining(first, **where)  # this checks the recipe and its text
    workers = Workers("dense", options, config, duo.model, duo.device)
    for text in settings.texts:
        dense.evaluation_windows(text, duo.tokenizer, settings)

    def work(folder: Path) -> None:
        workers.finish(plan(settings, folder, where), folder)
        rows = dense.measure_all(settings, folder, device=options.device)
        numbers = {"settings": {"command": command(), **config}, "rows": rows}
        write_json(folder / "dense.json", numbers)
        write_text(folder / "dense.md", dense.markdown(rows))
        show(Markdown(dense.markdown(rows)))
        say(f"wrote {folder}/: dense.json, dense.md, and a folder for each model")

    return "dense", work


def plan(settings: DenseOptions, folder: Path, where: dict[str, Any]) -> list[Job]:
    """One job per model; the last one starts from one of the others. `where`: `device` and `dtype` of `Pretraining`."""
    trainings = dense.plan(settings.recipe, settings.shares, folder)
    given = {name: {"options": asdict(training), **where} for name, training in trainings.items()}
    for options in (arguments["options"] for arguments in given.values()):
        options |= {name: Path(options[name]) for name in ("out", "model") if options[name]}
    jobs = [Job(name, folder / name, pretrain, given[name]) for name in trainings]
    last = jobs.pop()
    source = Path(trainings[last.name].model or "").name
    return [*jobs, Job(last.name, last.place, last.function, last.arguments, after=(source,))]
