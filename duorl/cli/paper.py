"""`duorl paper`."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

from agents import Agent
from duorl import dense, report
from duorl.checks import require_positive
from duorl.cli.folders import check_folder, make_folder
from duorl.cli.options import AgentFactory
from duorl.cli.workbench import console, make_lockstep, typed_command
from duorl.corpus import load_windows, source_names
from duorl.evaluate import check_searches
from duorl.models import load, load_tokenizer
from duorl.models.loading import model_folder
from duorl.paper import Study, StudySize, claims_page, draw, scaling
from duorl.rewards import LossImprovement
from duorl.routers import Router

_QUICK_UPDATES, _QUICK_DECISIONS = 40, 200_000
_LEAST_WINDOW = 8


class Paper:
    """`duorl paper`: everything that can be wrong with the input is found before a folder is made.

    Args:
        options: `PaperOptions` and the folder flags.
        config: the resolved options as YAML.
    """

    def __init__(self, options: Namespace, config: str):
        self.options, self.config = options, config
        check_folder(options)
        require_positive(total_decisions=options.total_decisions)
        if options.env.window < _LEAST_WINDOW:
            raise ValueError(
                f"env.window must be at least {_LEAST_WINDOW} tokens for a study, not {options.env.window}"
            )
        self.sources = {"prose": source_names(options.prose), "code": source_names(options.code)}
        named = [", ".join(names) for names in self.sources.values()]
        kept = dense.find(options.dense, model_folder(options.model), named)
        self.dense = [] if options.quick else kept
        self.model, self.tokenizer = load(options.model, skip=options.skip), load_tokenizer(options.model)
        read = partial(load_windows, tokenizer=self.tokenizer, length=options.env.window)
        self.training = read([name for names in self.sources.values() for name in names], split="router")
        self.texts = {name: read(names, split="evaluation") for name, names in self.sources.items()}
        self.size = StudySize.quick() if options.quick else options.size
        for name, windows in self.texts.items():
            if len(windows) < 2:
                raise ValueError(f"{name}: a study needs at least 2 windows of evaluation text: give more")
        counts = min(self.size.windows, max(map(len, self.texts.values()))), self.size.pattern_windows
        check_searches(self.model, options.env.window, ("small", "big"), *counts)
        self.soft = replace(options.soft, updates=_QUICK_UPDATES) if options.quick else options.soft
        self.total_decisions = _QUICK_DECISIONS if options.quick else options.total_decisions
        for factory in options.agents.values():
            for price in self.size.prices:
                self._agent(factory, price)

    def __call__(self) -> None:
        """Measure, draw, and write claims.md and report.html."""
        folder = make_folder(self.options, "paper", self.config)
        with console.status("") as status:
            figures = self._measure(folder, status.update)
        draw(figures, folder)
        settings = {"command": typed_command(), **yaml.safe_load(self.config)}
        (folder / "settings.json").write_text(json.dumps(settings, indent=1))
        page = claims_page(figures, model=self.options.model, command=typed_command())
        (folder / "claims.md").write_text(page)
        report.write(folder)
        console.print(f"wrote {folder}/: figure-*.png and .json, claims.md, report.html")
        if not any(name.startswith("8") for name in figures):
            console.print("Figure 8 is left out: no dense.json; make it with duorl dense and give --dense")

    def _measure(self, folder: Path, progress: Callable[[str], None]) -> dict[str, Any]:
        study = Study(
            self.model,
            self.tokenizer,
            self.training,
            self.texts,
            learners={name: partial(self._learn, factory) for name, factory in self.options.agents.items()},
            soft=self.soft,
            size=self.size,
            seed=self.options.seed,
            progress=progress,
        )
        figures = study.run()
        if self.options.quick:
            progress("figure 8: small models of its own")
            with contextlib.redirect_stdout(io.StringIO()):  # the Trainer prints its log
                self.dense = dense.quick(folder / "dense", self.sources, self.options.seed)
        return figures | scaling(self.dense, {name: ", ".join(names) for name, names in self.sources.items()})

    def _learn(self, factory: AgentFactory, price: float) -> Router:
        return self._agent(factory, price).learn(self.total_decisions)

    def _agent(self, factory: AgentFactory, price: float) -> Agent:
        return factory(
            make_lockstep(self.options.env, self.model, self.training, LossImprovement(price), seed=self.options.seed)
        )
