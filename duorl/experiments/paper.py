"""`duorl paper`."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from duorl.checks import require_positive
from duorl.corpus import source_names
from duorl.envs import Lockstep
from duorl.evaluation import check_searches
from duorl.evaluation.bound import can_search
from duorl.experiments.built import again, typed
from duorl.experiments.material import Material
from duorl.experiments.trainings import Workers
from duorl.experiments.voice import command, say, status
from duorl.experiments.workbench import make_lockstep
from duorl.files import write_json, write_text
from duorl.learners import Soft
from duorl.learners.base import Learner
from duorl.models.loading import model_folder
from duorl.paper import Study, Wanted, dense, scaling
from duorl.paper.claims import claims_page
from duorl.paper.measures import LOWER_BOUND
from duorl.paper.pictures import draw
from duorl.reports import page
from duorl.rewards import LossImprovement
from duorl.routers import Router
from duorl.routers import load as load_router
from duorl.runs.jobs import Job, Tell
from duorl.runs.training import Training

_LEAST_WINDOW = 8
_SAVE_EVERY = 120.0


def prepare(options: Namespace, config: dict[str, Any]) -> tuple[str, Callable[[Path], None]]:
    """The default name of the folder, and the study; see `Paper`."""
    paper = Paper(options, config)
    return "paper", partial(paper.run, Workers("paper", options, config, paper.model, paper.model.device))


class Paper:
    """`duorl paper`. The input is checked before a folder is made.

    Args:
        options: `PaperOptions` and the folder flags.
        config: the options as plain values.

    Raises:
        ValueError, OSError: the input cannot be used; the message names the thing and the fix.
    """

    def __init__(self, options: Namespace, config: dict[str, Any]):
        self.options, self.config, self.size = options, config, options.size
        require_positive(total_decisions=options.total_decisions, soft_windows=options.soft_windows)
        if options.env.window < _LEAST_WINDOW:
            raise ValueError(
                f"env.window must be at least {_LEAST_WINDOW} tokens for a study, not {options.env.window}"
            )
        self.soft = typed(Soft, options.soft, "soft", skip=("env", "budget"))
        self._read()
        for factory in options.agents.values():
            for price in self.size.prices:
                factory(self._lockstep(price))
        Soft(self._lockstep(0.0), **self.soft)
        self.say: Callable[[str], None] = lambda note: None

    def _read(self) -> None:
        """Read the model, and the texts by their names in the study."""
        options = self.options
        self.sources = {"prose": source_names(options.prose), "code": source_names(options.code)}
        named = [", ".join(names) for names in self.sources.values()]
        self.dense = _kept_dense(options.dense, model_folder(options.model), named)
        material = Material.of(options, options.env.window)
        self.model, self.tokenizer = material.model, material.tokenizer
        everything = [name for names in self.sources.values() for name in names]
        self.training = material.read(everything, split="router").tokens
        self.texts = {name: material.read(names, split="evaluation") for name, names in self.sources.items()}
        for name, windows in self.texts.items():
            if len(windows.tokens) < 2:
                raise ValueError(f"{name}: a study needs at least 2 windows of evaluation text: give more")
        counts = (
            min(self.size.windows, max(len(windows.tokens) for windows in self.texts.values())),
            self.size.pattern_windows,
        )
        self.too_many = _why_not(check_searches, self.model, options.env.window, ("small", "big"), *counts)
        if self.too_many and (missing := can_search(self.model, self.training[:1])):
            raise ValueError(f"a study needs the reference context: {missing}")

    def run(self, workers: Workers, folder: Path) -> None:
        """Train the routers, measure, draw, and write claims.md and report.html."""
        self.folder = folder
        if self.too_many:
            say(f"{self.too_many}: a search takes the oracle's place, a {LOWER_BOUND}")
        study = self._study(folder)
        workers.finish(self._jobs(study.wanted(), folder, workers), folder)
        with status("") as self.say:
            figures = self._measure(study)
        draw(figures, folder)
        write_json(folder / "settings.json", {"command": command(), **self.config})
        write_text(folder / "claims.md", claims_page(figures, model=self.options.model, command=command()))
        page.write(folder)
        say(f"wrote {folder}/: figure-*.png and .json, claims.md, report.html")
        if not any(name.startswith("8") for name in figures):
            say("Figure 8 is left out: no dense.json; make it with duorl dense and give --dense")

    def _study(self, folder: Path) -> Study:
        def router(wanted: Wanted) -> Router:
            return load_router(_place(wanted, folder)).to(self.model.device)

        return Study(
            self.model,
            self.tokenizer,
            self.training,
            self.texts,
            learners=list(self.options.agents),
            router=router,
            size=self.size,
            seed=self.options.seed,
            exact=self.too_many is None,
            progress=lambda note: self.say(note),
        )

    def _jobs(self, routers: Sequence[Wanted], folder: Path, workers: Workers) -> list[Job]:
        """The trainings of routers."""
        jobs = []
        for wanted in routers:
            place = _place(wanted, folder)
            arguments = {"wanted": list(wanted), "place": place, "events": folder / "tensorboard" / place.name}
            jobs.append(workers.placed(Job(place.name, place, self.train, arguments), train_apart, folder))
        return jobs

    def train(self, wanted: Sequence[Any], place: Path, events: Path, tell: Tell) -> dict[str, Any]:
        """Train a router: the function of a job.

        Args:
            wanted: the fields of a `Wanted`.
            place: folder for the router.
            events: folder of its TensorBoard events.
            tell: called after every update.
        """
        name, at, actions = wanted
        make = self._soft(at, actions) if name is None else partial(self.options.agents[name], self._lockstep(at))
        training = Training(self.options.total_decisions, place, events, _SAVE_EVERY, lambda router: {}, 1)
        training.run(make(), lambda router, journal: router, tell).save_pretrained(place)
        return {}

    def _measure(self, study: Study) -> dict[str, Any]:
        figures = study.run()
        if self.options.quick and not self.dense:
            self.say("figure 8: training small models")
            with contextlib.redirect_stdout(io.StringIO()):  # the Trainer prints its log
                where = self.model.device.type  # a Trainer takes no number of a GPU
                self.dense = dense.quick(self.folder / "dense", self.sources, self.options.seed, where)
        return figures | scaling(self.dense, {name: ", ".join(names) for name, names in self.sources.items()})

    def _lockstep(self, price: float, **more: Any) -> Lockstep:
        reward = LossImprovement(price)
        return make_lockstep(self.options.env, self.model, self.training, reward, seed=self.options.seed, **more)

    def _soft(self, compute: float, actions: Sequence[str]) -> Callable[[], Learner]:
        options = self.options
        lockstep = Lockstep(
            self.model,
            self.training,
            windows_per_batch=options.soft_windows,
            seed=options.seed,
            reward=LossImprovement(0.0),
            actions=tuple(actions),
        )
        return partial(Soft, lockstep, budget=compute, **self.soft)


def train_apart(run: Path, tell: Tell, **arguments: Any) -> dict[str, Any]:
    """Run `Paper.train` in another process, with a study from the run's configuration."""
    return _paper(run).train(tell=tell, **arguments)


@lru_cache(maxsize=1)
def _paper(run: Path) -> Paper:
    return Paper(*again("paper", run))


def _place(wanted: Wanted, folder: Path) -> Path:
    """Folder of a router in a run's folder."""
    return folder / "routers" / str(wanted).replace(" ", "-")


def _why_not(check: Callable[..., None], *arguments: Any) -> str | None:
    """What a check refuses, in its words; None if it does not."""
    try:
        check(*arguments)
    except ValueError as error:
        return str(error)
    return None


def _kept_dense(place: str | None, model: Path, texts: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a dense study; errors as for `dense.find`, and where its file is not one."""
    try:
        return dense.find(place, model, texts)
    except (LookupError, TypeError, json.JSONDecodeError) as error:
        where = place or model / "dense.json"
        raise ValueError(f"cannot read dense.json at {where}: {type(error).__name__}: {error}") from error
