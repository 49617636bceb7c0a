"""What training and comparing have in common: the model, the three splits, and the making of every learner."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace
from rich.console import Console
from torch import Tensor

from agents import Agent
from agents.target import TargetCompute, check_target, price_for
from duorl import report
from duorl.checks import require_positive
from duorl.cli.options import AgentFactory, EnvironmentOptions
from duorl.corpus import load_windows
from duorl.costs import action_ids
from duorl.evaluate import Comparer, Comparison, check_searches, evaluate, flatten, measure
from duorl.figures import frontier, heat_map, markdown, table
from duorl.journal import Journal
from duorl.models import DuoForCausalLM, load, load_tokenizer
from duorl.rewards import LossImprovement, Reward, price_of, with_price
from duorl.routers import (
    BudgetRouter,
    HeadRouter,
    Router,
    train_ensemble,
    train_knn,
    train_soft,
    train_supervised,
)
from envs import Lockstep, RoutingDynamics

_VALIDATION_WINDOWS = 16

console = Console()


class Workbench:
    """Reads the input of a run, refuses what cannot be used, and trains one learner after another.

    Args:
        options: `RunOptions`, with `agent` in place of `agents` for a single one.

    Raises:
        ValueError, OSError: the input cannot be used; the message names the thing and the fix.
    """

    def __init__(self, options: Namespace):
        self.options = options
        require_positive(total_decisions=options.total_decisions)
        action_ids([options.reference]), action_ids(options.actions)
        self.price = LossImprovement(price_of(options.reward)).price
        self.prices = options.env.prices
        if self.prices is not None and not self.prices[0] <= self.price <= self.prices[1]:
            raise ValueError(f"the reward's price {self.price:g} is not among env.prices {list(self.prices)}")
        self.model, self.tokenizer = load(options.model, skip=options.skip), load_tokenizer(options.model)
        self.read = partial(load_windows, tokenizer=self.tokenizer, length=options.env.window)
        self.training, self.validation = _hold_back(self.read(options.corpus, split="router"))
        evaluation = options.evaluation
        counts = (evaluation.fixed_windows, evaluation.reference_windows, options.supervised.windows)
        check_searches(self.model, options.env.window, options.actions, *counts)
        self._try_reward()
        if options.get("target_compute") is not None:
            check_target(options.target_compute)
            with_price(options.reward)

    @cached_property
    def held_out(self) -> Tensor:
        """(W, T+1) of the evaluation split: only ever measured on."""
        return self.read(self.options.corpus, split="evaluation")

    def _try_reward(self) -> None:
        """One episode of one window: a reward that cannot be used is found before anything is written."""
        trial = RoutingDynamics(self.model, reward=self.options.reward, actions=self.options.actions)
        trial.reset(self.training[:1])
        while not trial.done:
            trial.step(torch.zeros(self.options.env.window, dtype=torch.int64, device=self.model.device))

    def agent(self, factory: AgentFactory, seed: int, name: str = "") -> Agent:
        """A fresh learner, of that name among the run's; errors as for its class and its environment."""
        options = self.options
        lockstep = make_lockstep(
            replace(EnvironmentOptions(**vars(options.env)), **options.get("own_env", {}).get(name, {})),
            self.model,
            self.training,
            options.reward,
            seed=seed,
            actions=options.actions,
            reference=options.reference,
        )
        return factory(lockstep)

    def learn(self, agent: Agent, name: str, events: Path, config: str, update: Callable[..., None]) -> Router:
        """Train an agent, and journal it.

        Args:
            agent: fresh.
            name: of the router.
            events: folder of its TensorBoard events.
            config: the resolved options as YAML.
            update: told after every update: `completed` decisions, and a `note`.
        """
        total, journal = self.options.total_decisions, Journal(events)
        every = max(1, total // max(1, self.options.validations))

        def monitor(decisions: int, metrics: Mapping[str, float], router: Router) -> None:
            journal.scalars(decisions, metrics)
            update(completed=decisions, note=f"return {metrics['rollout/return']:+.4f}")
            if decisions // every > (decisions - agent.decisions_per_update) // every:
                journal.scalars(decisions, self._validate(router))

        router = self._to_target(agent, monitor)
        routes = measure(self.model, self.deployed(router), self.validation).routes
        journal.picture(total, "routes/share_of_big", heat_map(routes, f"{name} on held-out router text"))
        journal.hparams(_scalars(config), self._validate(router))
        journal.close()
        return router if self.options.env.big_layers is None else self.deployed(router)

    def _to_target(self, agent: Agent, monitor: Callable[..., None]) -> Router:
        """Learn; with a target compute, at the price at which that is spent, which becomes the run's."""
        options = self.options
        if options.get("target_compute") is None:
            return agent.learn(options.total_decisions, monitor)
        if self.prices is not None:
            router = agent.learn(options.total_decisions, monitor)
            self.price = price_for(router, options.target_compute, self.spending)
            return router.at(price=self.price)
        dual = TargetCompute(agent, options.target_compute, self.spending, price=self.price)
        router = dual.learn(options.total_decisions, monitor)
        self.price = dual.price
        if not dual.met:
            console.print(
                f"held-out compute is {dual.compute:.3f}, not within 0.01 of {dual.target:g}: train for longer"
            )
        return router

    def spending(self, router: Router) -> float:
        """Mean compute on router text that no agent trains on."""
        return measure(self.model, router, self.validation).compute.mean().item()

    def _validate(self, router: Router) -> dict[str, float]:
        """Metrics on router text that no agent trains on; the evaluation split stays untouched until the end."""
        options = self.options
        found = evaluate(
            self.model, self.deployed(router), self.validation, price=self.price, reference=options.reference
        )
        return {f"validation/{key}": value for key, value in found.items()}

    def deployed(self, router: Router) -> Router:
        """The router at the run's price, where it takes one, and held to the run's hard budget, where there is one."""
        router = router.at(price=self.price) if router.takes_price else router
        budget = self.options.env.big_layers
        return router if budget is None or not isinstance(router, HeadRouter) else BudgetRouter(router, budget)

    def rival(self, name: str, seed: int) -> Router:
        """Train a router without reinforcement learning: `supervised`, `soft`, `knn`, `ensemble` or `knowable`."""
        options = self.options
        # Wide heads on the same inputs, an estimate of what could have been known from them.
        wide = replace(options.supervised, width=options.get("knowable", 0))
        trainers: dict[str, Callable[..., Router]] = {
            "supervised": partial(train_supervised, options=options.supervised),
            "soft": partial(train_soft, options=options.soft),
            "knn": partial(train_knn, options=options.knn),
            "ensemble": partial(train_ensemble, options=options.ensemble),
            "knowable": partial(train_supervised, options=wide),
        }
        more = {"price": self.price, "prices": self.prices, "actions": options.actions, "seed": seed}
        return trainers[name](self.model, self.training, **more)

    def comparer(self) -> Comparer:
        """Measures routers on the evaluation split."""
        return make_comparer(self.options, self.model, self.training, self.held_out, self.price)

    def settings(self, config: str) -> dict[str, Any]:
        """What a reader needs to repeat a comparison."""
        return {"command": typed_command(), "price": self.price, **yaml.safe_load(config)}


def make_lockstep(
    env: EnvironmentOptions, model: DuoForCausalLM, training: Tensor, reward: Reward, *, seed: int, **more: Any
) -> Lockstep:
    """The tokens that options describe."""
    return Lockstep(
        model,
        training,
        windows_per_batch=env.windows_per_batch,
        seed=seed,
        reward=reward,
        context=env.context,
        group_size=env.group_size,
        token_discount=env.token_discount,
        prices=env.prices,
        signals=env.signals,
        big_layers=env.big_layers,
        **more,
    )


def make_comparer(
    options: Namespace, model: DuoForCausalLM, training: Tensor, held_out: Tensor, price: float
) -> Comparer:
    """What compares routers as a run's options say."""
    return Comparer(
        model,
        training,
        held_out,
        price=price,
        actions=options.actions,
        reference=options.reference,
        options=options.evaluation,
    )


def typed_command() -> str:
    """What repeats the run: what was typed, less the word to go on with it."""
    program = Path(sys.argv[0]).name
    typed = [word for word in sys.argv[1:] if word != "--resume"]
    return shlex.join([*(["python", program] if program.endswith(".py") else [program]), *typed])


def write(comparison: Comparison, traces: dict[str, Any], folder: Path) -> None:
    """Print a comparison's table and write its numbers, its figure and its report."""
    console.print(table(comparison))
    comparison.save(folder)
    (folder / "comparison.md").write_text(markdown(comparison))
    figures = folder / "figures"
    figures.mkdir(exist_ok=True)
    frontier(comparison).savefig(figures / "frontier.png", dpi=150)
    (folder / "traces.json").write_text(json.dumps(traces))
    report.write(folder)


def _hold_back(windows: Tensor) -> tuple[Tensor, Tensor]:
    """Router-training text without its last windows, and those, on which training is only watched."""
    held = min(_VALIDATION_WINDOWS, len(windows) // 8)
    if held == 0:
        raise ValueError(f"the router split has {len(windows)} windows, too few to learn on: give more text")
    return windows[:-held], windows[-held:]


def _scalars(config: str) -> dict[str, str | float | bool]:
    """The leaves of a YAML configuration by dotted name, for TensorBoard's table of hyper-parameters."""
    return {key: value for key, value in flatten(yaml.safe_load(config)) if isinstance(value, (str, int, float))}
