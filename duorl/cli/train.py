"""`duorl train`: one agent, beside all that it is measured against."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from jsonargparse import Namespace
from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeElapsedColumn

from duorl.cli.folders import check_folder, check_same_options, make_folder
from duorl.cli.workbench import Workbench, console, write
from duorl.costs import ACTIONS
from duorl.routers import ConstantRouter, RandomRouter, Router
from duorl.routers import load as load_router


class Train:
    """Everything that can be wrong with the input is found before a folder is made.

    Args:
        options: `RunOptions` with `agent` in place of `agents`, and the folder flags.
        config: the resolved options as YAML.

    Raises:
        ValueError, OSError: the input cannot be used; the message names the thing and the fix.
    """

    def __init__(self, options: Namespace, config: str):
        self.options, self.config = options, config
        check_folder(options)
        check_same_options(options, config)
        self.bench = Workbench(options)
        self.agent = self.bench.agent(options.agent, options.seed)
        self.name = type(self.agent).__name__

    def __call__(self) -> None:
        """Train what the folder does not hold yet, compare, and say where everything is."""
        self.folder = make_folder(self.options, self.name.lower(), self.config)
        bench = self.bench
        with progress_bars() as progress:
            learned = self._kept(self.folder / "router", partial(self._learn, progress))
            bench.price = learned.config.get("price") or bench.price
            task = progress.add_task("compare", total=len(self.options.rivals) + 1, note="")
            rivals = {}
            for name in self.options.rivals:
                progress.update(task, note=f"train the {name} router")
                make = partial(bench.rival, name, self.options.seed)
                rivals[name] = self._kept(self.folder / "routers" / name, make)
                progress.update(task, advance=1)
            progress.update(task, note="measure on held-out text")
            comparer = bench.comparer()
            routers = {
                **unlearned(self.options.actions, self.options.seed),
                "best fixed": comparer.fixed,
                **rivals,
                self.name: learned,
                "oracle": comparer.oracle,
            }
            deployed = {name: [bench.deployed(router)] for name, router in routers.items()}
            comparison = comparer.compare(deployed, bench.settings(self.config))
            progress.update(task, advance=1, note="")
        write(comparison, comparer.traces(bench.tokenizer), self.folder)
        self._say_where()

    def _kept(self, place: Path, make: Callable[[], Router]) -> Router:
        """The folder's router of that name where the run resumes, else a new one, saved."""
        if self.options.resume and (place / "router.json").is_file():
            return load_router(place).to(self.bench.model.device)
        router = make()
        router.save_pretrained(place)
        return router

    def _learn(self, progress: Progress) -> Router:
        task = progress.add_task(f"train {self.name}", total=self.options.total_decisions, note="")
        events = self.folder / "tensorboard" / self.name
        shutil.rmtree(events, ignore_errors=True)  # an interrupted training's curve would lie under the new one
        return self.bench.learn(self.agent, self.name, events, self.config, partial(progress.update, task))

    def _say_where(self) -> None:
        console.print(
            f"\nwrote {self.folder}/: report.html, comparison.json and .csv, figures/, router/, routers/, config.yaml"
        )
        say_logdir(self.folder)


def unlearned(actions: list[str], seed: int) -> dict[str, Router]:
    """The routers that learn nothing, by the names that tables give them."""
    return {"random": RandomRouter(actions, seed), **{f"all-{action}": ConstantRouter(action) for action in ACTIONS}}


def progress_bars() -> Progress:
    """Bars with a note each."""
    columns = ("{task.description}", BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), "{task.fields[note]}")
    return Progress(*columns, console=console)


def say_logdir(folder: Path) -> None:
    """How TensorBoard is started here, whether or not the virtual environment is activated."""
    program = "tensorboard" if shutil.which("tensorboard") else str(Path(sys.executable).with_name("tensorboard"))
    console.print(f"{program} --logdir {folder / 'tensorboard'}", soft_wrap=True)
