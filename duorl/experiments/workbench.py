"""The input of training and comparing: model, three splits, and the training of every learner."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from inspect import signature
from pathlib import Path
from typing import Any, get_args

import torch
from jsonargparse import Namespace
from torch import Tensor

from duorl import ranks
from duorl.checks import require_positive
from duorl.corpus import Windows
from duorl.costs import action_ids
from duorl.envs import Lockstep
from duorl.evaluation.bound import ROWS
from duorl.evaluation.compare import flatten
from duorl.evaluation.measure import evaluate, measure
from duorl.experiments.built import typed
from duorl.experiments.comparing import MIX
from duorl.experiments.learners import LearnerFactory, named
from duorl.experiments.material import Material
from duorl.experiments.options import EnvironmentOptions
from duorl.learners import Supervised
from duorl.learners.base import Learner, Rule
from duorl.learners.target import TargetCompute, check_target
from duorl.models import DuoForCausalLM
from duorl.reports.figures import heat_map
from duorl.rewards import LossImprovement, Reward, as_reward, is_loss_improvement, price_of, with_price
from duorl.routers import BudgetRouter, Router, price_for, spent
from duorl.routers.base import LogitRouter
from duorl.runs.jobs import RESULT, Tell
from duorl.runs.journal import Journal
from duorl.runs.training import Training

KNOWABLE = "knowable"
_SHARED = {"window", "prices", "big_layers"}  # options of the whole run: windows, prices and budget of the comparison
_VALIDATION_WINDOWS = 16


class Workbench:
    """Reads and checks the input of a run, and trains one learner after the other.

    Args:
        options: `RunOptions`, with `agent` in place of `agents` for one agent.
        config: the same options as plain values.

    Attributes:
        price: nats per all-big pass; with a target, the price at the start.
        agents: names of the agents.
        rivals: names of the learners to compare with.
        sizes: the options of the evaluation for this model.

    Raises:
        ValueError, OSError: bad input; the message names it and the fix.
    """

    def __init__(self, options: Namespace, config: dict[str, Any]):
        self.options, self.config = options, config
        require_positive(total_decisions=options.total_decisions)
        action_ids([options.reference]), action_ids(options.actions)
        self.reward = as_reward(options.reward)
        self.price = LossImprovement(price_of(self.reward)).price
        self.prices = options.env.prices
        if self.prices is not None and not self.prices[0] <= self.price <= self.prices[1]:
            raise ValueError(f"the reward's price {self.price:g} is not among env.prices {list(self.prices)}")
        self._name_learners()
        self.target = options.get("target_compute")
        if self.target is not None:
            check_target(self.target)
            with_price(self.reward)
            if options.env.big_layers is not None:
                raise ValueError("env.big_layers already fixes the compute: give it or target_compute, not both")
        material = Material.of(options, options.env.window)
        self.model, self.tokenizer, self.read = material.model, material.tokenizer, material.read
        self.sizes = options.evaluation.sized(self.model.num_layers)
        self.training, self.validation = _hold_back(self.read(options.corpus, split="router").tokens)
        self._try_reward()
        for name in self._factories:
            self.learner(name, options.seed)

    def _name_learners(self) -> None:
        options = self.options
        agents = options.agents if "agents" in options else {_class_name(self.config["agent"]): options.agent}
        rivals = options.rivals
        if not isinstance(rivals, dict):
            short = [name.rpartition(".")[2] for name in rivals]
            if len(set(short)) < len(short):
                raise ValueError(f"two rivals have one name among {short}: give each its own name, as a dictionary")
            rivals = dict(zip(short, map(named, rivals), strict=True))
        if not agents:
            raise ValueError("no agents to compare: name at least one in `agents`")
        self.agents, self.rivals = list(agents), list(rivals)
        self._factories: dict[str, LearnerFactory] = {**rivals, **agents}
        if options.get("knowable"):
            # A large network on the same inputs, to estimate the avoidable part of the regret.
            self._factories[KNOWABLE] = partial(Supervised, width=options.knowable)
        taken = {"random", "all-skip", "all-small", "all-big", "best fixed", MIX, *ROWS.values(), KNOWABLE}
        if options.get("labels") and not any(map(_learns_from_labels, self._factories.values())):
            raise ValueError("labels: no learner takes them: name Supervised, KNN or Ensemble, without `base`")
        for name in (*agents, *rivals):
            if name in taken or Path(name).name != name or (name in rivals and name in agents):
                raise ValueError(f"a learner cannot be called {name!r}: the comparison or the folder uses that name")
        self._read_own_env()
        self._check_starts()

    def _read_own_env(self) -> None:
        options, self._own_env = self.options, {}
        if unknown := set(options.own_env) - set(self._factories):
            raise ValueError(f"own_env names {min(unknown)!r}, which is not among the learners")
        for name, given in options.own_env.items():
            own = typed(EnvironmentOptions, given, f"own_env of {name}")
            if shared := _SHARED & set(own):
                raise ValueError(f"own_env of {name}: {min(shared)} is an option of the whole run, set it in env")
            self._own_env[name] = own

    def _check_starts(self) -> None:
        """A learner starts from one that is named before it, so no two wait for each other."""
        names = [*self.rivals, *self.agents]
        self._starts = self.options.get("starts", {})
        for name, other in self._starts.items():
            if not {name, other} <= set(names) or names.index(other) >= names.index(name):
                order = f"in this order: {', '.join(names)}"
                raise ValueError(
                    f"starts: {name!r} cannot start from {other!r}, only from a learner before it, {order}"
                )

    @cached_property
    def evaluation(self) -> Windows:
        """Windows of the evaluation split; used for measurements only."""
        return self.read(self.options.corpus, split="evaluation")

    @property
    def held_out(self) -> Tensor:
        """The tokens of these windows, (W, T+1)."""
        return self.evaluation.tokens

    def _try_reward(self) -> None:
        """Play one episode of one window, so that a bad reward is refused before anything is written."""
        options = self.options
        more = {"actions": options.actions, "reference": options.reference}
        env = replace(options.env, windows_per_batch=1, later_effects=False)  # which are measured before an episode
        trial = make_lockstep(env, self.model, self.training, self.reward, seed=options.seed, **more)
        trial.draw()
        while not trial.done:
            trial.step(torch.zeros_like(trial.compute, dtype=torch.int64))

    def learner(self, name: str, seed: int, start: Path | None = None) -> Learner:
        """Make a new learner, by its name in the run; errors as for its class and its environment.

        Args:
            name: its name.
            seed: its seed.
            start: folder of the router from which it starts, if `starts` names one.
        """
        options = self.options
        own = replace(EnvironmentOptions(**vars(options.env)), **self._own_env.get(name, {}))
        more = {"actions": options.actions, "reference": options.reference}
        factory: Callable[..., Learner] = self._factories[name]
        own, reward = self._as_rival(name, own)
        lockstep = make_lockstep(own, self.model, self.training, reward, seed=seed, **more)
        if options.get("labels") and _learns_from_labels(factory):
            factory = partial(factory, base=options.labels)
        if name not in self._starts:
            return factory(lockstep)
        try:
            return factory(lockstep, init=start and str(start))
        except TypeError as error:
            raise ValueError(f"starts: {name} cannot start from a router, it has no option `init`") from error

    def _as_rival(self, name: str, env: EnvironmentOptions) -> tuple[EnvironmentOptions, Reward]:
        """The rules of a learner: those of the run; a rival that cannot follow one of them learns without it."""
        honours = _honours(self._factories[name])
        if name in self.agents:
            return env, self.reward
        if "big_layers" not in honours:
            env = replace(env, big_layers=None)
        follows = "reward" in honours or is_loss_improvement(self.reward)
        return env, self.reward if follows else LossImprovement(self.price)

    @property
    def notes(self) -> list[str]:
        """What rivals learn without, for the terminal."""
        others = [name for name in self.rivals if "reward" not in _honours(self._factories[name])]
        free = [name for name in self.rivals if "big_layers" not in _honours(self._factories[name])]
        said = []
        if others and not is_loss_improvement(self.reward):
            said.append(f"{', '.join(others)}: trained on gain - price * compute, not on {self.reward.name}")
        if free and self.options.env.big_layers is not None:
            said.append(f"{', '.join(free)}: big_layers is kept in deployment only, not in the training")
        return said

    def train(
        self,
        name: str,
        seed: int,
        place: Path,
        events: Path,
        tell: Tell,
        price_from: Path | None = None,
        start: Path | None = None,
    ) -> dict[str, Any]:
        """Train a learner, log it and save its router: the function of a job.

        Args:
            name: name of the learner.
            seed: seed of all random generators.
            place: folder for the router.
            events: folder of its TensorBoard events.
            tell: called after every update.
            price_from: folder of the learner whose training found the price.
            start: folder of the router from which it starts.

        Returns:
            `price`, the price of the router in deployment.
        """
        learner, options = self.learner(name, seed, start), self.options
        work = _Work(self, name, learner, self.price, tell)
        if price_from is not None:
            work.price = json.loads((price_from / RESULT).read_text())["price"]
            if self.prices is None:
                learner.charge(work.price)
        elif self.target is not None:
            work.aim(self.target)
        training = Training(
            total=options.total_decisions,
            place=place,
            events=events,
            save_every=options.save_every,
            validate=work.validate,
            validations=options.validations,
        )
        router = training.run(work.trained, work.finish, tell)
        if ranks.first():
            router.save_pretrained(place)
        return {"price": work.price}

    def deployed(self, router: Router, price: float) -> Router:
        """The router at a price, if price is its input, and with the run's hard budget, if there is one."""
        router = router.at(price=price) if router.takes_price else router
        budget = self.options.env.big_layers
        if budget is None or isinstance(router, BudgetRouter) or not isinstance(router, LogitRouter):
            return router
        return BudgetRouter(router, budget)


class _Work:
    """One learner's training on a workbench."""

    def __init__(self, bench: Workbench, name: str, learner: Learner, price: float, tell: Tell):
        self.bench, self.name, self.learner, self.tell = bench, name, learner, tell
        self.price = price
        self.target: float | None = None
        self.trained: Learner | TargetCompute = learner

    def aim(self, target: float) -> None:
        """Find the price at which the router spends the target."""
        self.target = target
        if self.bench.prices is None:
            self.trained = TargetCompute(self.learner, target, self.spending, price=self.price)

    def spending(self, router: Router) -> float:
        """Mean compute on router text that no training uses."""
        return spent(self.bench.model, router, self.bench.validation)

    def validate(self, router: Router) -> dict[str, float]:
        """Metrics on router text that no training uses; the evaluation split is used only at the end."""
        bench, price = self.bench, self.trained.price if isinstance(self.trained, TargetCompute) else self.price
        found = evaluate(
            bench.model,
            bench.deployed(router, price),
            bench.validation,
            price=price,
            reference=bench.options.reference,
        )
        return {f"validation/{key}": value for key, value in found.items()}

    def finish(self, router: Router, journal: Journal) -> Router:
        """The trained router at its price; its picture and its hyper-parameters go to TensorBoard."""
        bench, decisions = self.bench, self.learner.decisions
        if isinstance(self.trained, TargetCompute):
            self.price = self.trained.price
            if not self.trained.met:
                spent = f"held-out compute is {self.trained.compute:.3f}, not within 0.01 of {self.target:g}"
                self.tell(line=f"{spent}: train for longer")
        elif self.target is not None:
            self.price = price_for(router, self.target, self.spending)
            router = router.at(price=self.price)
        shown = bench.deployed(router, self.price)
        if not ranks.first():
            return router
        routes = measure(bench.model, shown, bench.validation).routes
        journal.picture(decisions, "routes/share_of_big", heat_map(routes, f"{self.name} on held-out router text"))
        journal.hparams(decisions, _scalars(bench.config), self.validate(router))
        return router if bench.options.env.big_layers is None else shown


def _learns_from_labels(factory: Callable[..., Learner]) -> bool:
    """Whether a learner takes labels, and its options do not say from where."""
    if isinstance(factory, partial) and "base" in factory.keywords:  # with all of its options
        return factory.keywords["base"] is None
    kind = factory.func if isinstance(factory, partial) else factory
    return "base" in signature(kind).parameters


def _honours(factory: Callable[..., Learner]) -> frozenset[Rule]:
    """The rules that a learner follows; see `Learner.honours`."""
    said = (factory.func, *factory.args) if isinstance(factory, partial) else (factory,)  # the parser hides the class
    kind = next((each for each in said if isinstance(each, type)), None)
    return getattr(kind, "honours", frozenset(get_args(Rule)))


def make_lockstep(
    env: EnvironmentOptions,
    model: DuoForCausalLM,
    training: Tensor,
    reward: Reward | Callable,
    *,
    seed: int,
    **more: Any,
) -> Lockstep:
    """The environment that the options describe."""
    return Lockstep(
        model,
        training,
        windows_per_batch=env.windows_per_batch,
        seed=seed,
        reward=reward,
        context=env.context,
        group_size=env.group_size,
        token_discount=env.token_discount,
        later_effects=env.later_effects,
        prices=env.prices,
        inputs=env.inputs,
        big_layers=env.big_layers,
        **more,
    )


def _hold_back(windows: Tensor) -> tuple[Tensor, Tensor]:
    """Split router text: windows for training, and the last windows, for measurements during the training."""
    held = min(_VALIDATION_WINDOWS, len(windows) // 8)
    if held == 0:
        raise ValueError(f"the router split has {len(windows)} windows, too few to learn on: give more text")
    return windows[:-held], windows[-held:]


def _class_name(agent: str | Mapping[str, Any]) -> str:
    """Short name of an agent in a configuration, e.g. PPO."""
    path = agent if isinstance(agent, str) else agent["class_path"]
    return path.rpartition(".")[2]


def _scalars(config: Mapping[str, Any]) -> dict[str, str | float | bool]:
    """The values of a configuration by dotted name, for TensorBoard's table of hyper-parameters."""
    return {key: value for key, value in flatten(config) if isinstance(value, (str, int, float))}
