"""Learner: the interface of everything that trains a router, with or without reinforcement learning.

A learner is made from a `Task` and its own options. The task has the text and the rules; `duorl.envs.Lockstep` is one:

    learner = duorl.learners.Soft(env)
    router = learner.learn(total_decisions=1_000_000)        # a second call continues

Your own learner defines `update`. It names in `stateful` the attributes that training changes, beside the router:

    class Mine(duorl.learners.HeadLearner):
        def update(self):                                    # one step of training
            ...
            return {"train/loss": loss.item()}               # metrics by TensorBoard tag

`duorl.testing.check_learner` checks it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from duorl import ranks
from duorl.models.frozen import require_frozen
from duorl.paths import RouterPath
from duorl.rewards import Reward, is_loss_improvement
from duorl.routers import HeadRouter, PatternRouter, Router, load
from duorl.routers.fit import identity
from duorl.routers.heads import LayerHeads

if TYPE_CHECKING:
    from duorl.models import DuoForCausalLM

Monitor = Callable[[int, dict[str, float], Router], None]
"""Called after every update with the layer decisions so far, metrics by TensorBoard tag, and the router."""

Rule = Literal["reward", "big_layers", "prices"]
State = dict[str, Any]
"""Content of a checkpoint: nested dictionaries and lists of tensors, numbers and strings."""


class Task(Protocol):
    """Model, text and rules of a training. `duorl.envs.Lockstep` is one.

    Attributes:
        model: a frozen duo model of L layers.
        windows: (W, T+1), text of the router split.
        reward: pays for decisions.
        actions: names of the allowed actions, cheapest first.
        prices: lowest and highest price, if one router is trained for a range of prices; else None.
        charged: the price in nats per all-big pass, if there is only one.
        inputs: names of the router's further inputs (`duorl.inputs`).
        big_layers: hard budget: every token must have exactly this number of big layers; None without one.
        first_seed: seed of all random generators.
        windows_per_batch: windows in lockstep, B.
        num_tokens: tokens in lockstep.
        layers: L.
    """

    model: DuoForCausalLM
    windows: Tensor
    reward: Reward
    actions: tuple[str, ...]
    prices: tuple[float, float] | None
    big_layers: int | None
    first_seed: int
    layers: int
    windows_per_batch: int

    @property
    def inputs(self) -> Sequence[str]: ...  # noqa: D102

    @property
    def charged(self) -> float: ...  # noqa: D102

    @property
    def num_tokens(self) -> int: ...  # noqa: D102

    def charge(self, price: float) -> None: ...  # noqa: D102

    def reference_losses(self, index: Tensor) -> Tensor: ...  # noqa: D102

    def state(self) -> State: ...  # noqa: D102

    def restore(self, state: State) -> None: ...  # noqa: D102


class Learner(ABC):
    """Trains a router, update by update.

    All learners report the same TensorBoard tags over the same x axis, layer decisions (docs/reference/metrics.md). So
    their curves can be compared.

    Args:
        env: the task; its seed starts all random generators.

    Attributes:
        router: the router in training.
        decisions: layer decisions learned from so far.
        planned: layer decisions asked for so far, by all calls of `learn`. Schedules, for example of the learning
            rate, follow `progress` = decisions / planned.
        stateful: names of the attributes that training changes, beside the router: modules, optimizers, generators,
            tensors, numbers, lists of these. They are saved and restored with the router.
        honours: the rules of a task that the training follows: any `reward` (without it, `gain - price * compute`
            alone), a hard budget (`big_layers`), a range of `prices`. A task with another rule is refused.

    Raises:
        ValueError: the model has a trainable parameter, or the task has a rule that the learner does not follow.
    """

    router: Router
    stateful: tuple[str, ...] = ()
    honours: frozenset[Rule] = frozenset({"reward", "prices"})

    def __init__(self, env: Task):
        require_frozen(env.model)
        self._require_honoured(env)
        self.env = env
        self.decisions = 0
        self.planned = 0

    def follows(self, reward: Reward) -> bool:
        """Whether the training follows a reward."""
        return "reward" in self.honours or is_loss_improvement(reward)

    def _require_honoured(self, env: Task) -> None:
        name = type(self).__name__
        if not self.follows(env.reward):
            raise ValueError(
                f"{name} learns from gain - price * compute alone and cannot follow the reward {env.reward.name}: use "
                "PPO or another learner by reinforcement"
            )
        if env.big_layers is not None and "big_layers" not in self.honours:
            others = "MaskablePPO, REINFORCE, ReinMax or GFlowNet"
            raise ValueError(f"{name} cannot keep big_layers {env.big_layers}: use {others}")
        if env.prices is not None and "prices" not in self.honours:
            raise ValueError(f"{name} cannot learn for a range of prices: give one price")

    @property
    def decisions_per_update(self) -> int:
        """Layer decisions that one update learns from: all layers of all tokens, on all ranks."""
        return ranks.count() * self.env.layers * self.env.num_tokens

    @property
    def progress(self) -> float:
        """Share of the planned decisions that is done, in [0, 1]."""
        return self.decisions / self.planned if self.planned else 0.0

    @abstractmethod
    def update(self) -> dict[str, float]:
        """One step of training; returns its metrics by TensorBoard tag."""

    def learn(self, total_decisions: int, monitor: Monitor | None = None) -> Router:
        """Train on further decisions.

        Args:
            total_decisions: layer decisions to learn from, rounded up to whole updates.
            monitor: called after every update.

        Returns:
            The trained router, frozen.
        """
        self.planned += self.span(total_decisions)
        return self.go_on(monitor)

    def span(self, total_decisions: int) -> int:
        """Decisions that a call of `learn` adds to the plan; learners whose options fix the number override this."""
        return total_decisions

    def go_on(self, monitor: Monitor | None = None) -> Router:
        """Train until all planned decisions are done; after `restore`, on the remaining ones."""
        self.router.train().requires_grad_(True)
        while self.decisions < self.planned:
            metrics = ranks.averaged(self.update())
            self.decisions += self.decisions_per_update
            if monitor:
                monitor(self.decisions, metrics, self.router)
        self.router.trained_for = identity(self.env.model)
        return self.router.eval().requires_grad_(False)

    def charge(self, price: float) -> None:
        """Set the price of an all-big pass, in nats.

        Raises:
            ValueError: the task's reward has no price to change.
        """
        self.env.charge(price)

    def state(self) -> State:
        """State after an update, complete: training continues from it with the same result, to the last bit."""
        parts = {name: _state_of(getattr(self, name)) for name in self.stateful}
        router = dict(self.router.state_dict())
        counters = {"decisions": self.decisions, "planned": self.planned}
        return {**counters, "router": router, "env": self.env.state(), "parts": parts}

    def restore(self, state: State) -> None:
        """Load the state of a learner with the same task and options."""
        self.decisions, self.planned = state["decisions"], state["planned"]
        self.router.load_state_dict(state["router"])
        self.env.restore(state["env"])
        for name in self.stateful:
            _restore(self, name, state["parts"][name])


def _is_part(value: Any) -> bool:
    """Whether a value is an object that loads a state, and is not replaced."""
    kinds = (Tensor, torch.Generator, np.random.Generator)
    return isinstance(value, kinds) or hasattr(value, "load_state_dict") or hasattr(value, "restore")


def _state_of(part: Any) -> Any:
    if isinstance(part, list):
        return [_state_of(one) for one in part]
    if isinstance(part, Tensor):
        return part.detach()
    if hasattr(part, "state_dict"):
        return part.state_dict()
    if isinstance(part, torch.Generator):
        return part.get_state()
    if isinstance(part, np.random.Generator):
        return part.bit_generator.state
    return part.state() if hasattr(part, "state") else part


def _restore(owner: Any, name: str, state: Any) -> None:
    """Objects load their state; plain values are replaced."""
    part = getattr(owner, name)
    if isinstance(part, list) and part and all(map(_is_part, part)):
        for one, its in zip(part, state, strict=True):
            _take_over(one, its)
    elif _is_part(part):
        _take_over(part, state)
    else:
        setattr(owner, name, state)


def _take_over(part: Any, state: Any) -> None:
    if isinstance(part, Tensor):
        part.data.copy_(state)
    elif isinstance(part, torch.Generator):
        part.set_state(state)
    elif isinstance(part, np.random.Generator):
        part.bit_generator.state = state
    elif hasattr(part, "load_state_dict"):
        part.load_state_dict(state)
    else:
        part.restore(state)


class HeadLearner(Learner):
    """Trains a `HeadRouter` by Adam. The learning rate falls linearly to 0 over the planned decisions.

    Args:
        env: the task; its seed also starts the weights.
        learning_rate: learning rate of Adam at the start.
        width: hidden units of a head; 0 for linear heads.
        init: folder of a saved router to start from; its sizes are used. None for a new router.

    Attributes:
        optimizer: optimizer of the router's weights.

    Raises:
        ValueError: the saved router does not fit this task.
    """

    router: HeadRouter
    stateful: tuple[str, ...] = ("optimizer",)

    def __init__(self, env: Task, *, learning_rate: float, width: int = 0, init: RouterPath | None = None):
        super().__init__(env)
        if not 0 < learning_rate < math.inf:
            raise ValueError(f"learning_rate must be above 0, not {learning_rate}")
        fresh = self.fresh(width, env.first_seed)
        self.router = (fresh if init is None else _saved(init, fresh, env.model)).to(env.model.device)
        self.learning_rate = learning_rate
        self.optimizer = torch.optim.Adam(self.router.parameters(), lr=learning_rate)

    def fresh(self, width: int, seed: int) -> HeadRouter:
        """A new, untrained router for the task."""
        env = self.env
        return HeadRouter(
            env.layers,
            env.model.hidden_size,
            env.actions,
            width=width,
            seed=seed,
            prices=env.prices,
            inputs=env.inputs,
        )

    def critic_heads(self) -> LayerHeads:
        """New heads with one output and the inputs of the router; the optimizer trains their weights too."""
        config = self.router.config
        heads = LayerHeads(
            self.env.layers,
            self.env.model.hidden_size,
            1,
            config["width"],
            torch.Generator().manual_seed(self.env.first_seed + 1),
            self.router.inputs.width(self.env.model.hidden_size),
        ).to(self.env.model.device)
        self.optimizer.param_groups[0]["params"].extend(heads.parameters())
        return heads

    @property
    def rate(self) -> float:
        """The current learning rate."""
        return self.learning_rate * (1 - self.progress)

    def descend(self, loss: Tensor) -> None:
        """Make one gradient step at the current learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        self.optimizer.zero_grad()
        loss.backward()
        ranks.average_gradients(self.optimizer.param_groups[0]["params"])
        for parameter in self.optimizer.param_groups[0]["params"]:
            if parameter.grad is not None and not parameter.grad.isfinite().all():
                name = type(self).__name__
                raise ValueError(f"{name}: a gradient is not finite after {self.decisions} decisions: check the reward")
        self.optimizer.step()


def _saved(folder: str, fresh: HeadRouter, model: DuoForCausalLM) -> HeadRouter:
    """The router saved in a folder, if it fits in place of the new one."""
    router = load(folder)
    if isinstance(router, PatternRouter):
        return fresh.leaning(router.config["route"])
    same = ("layers", "hidden_size", "actions", "prices", "inputs")
    if not isinstance(router, HeadRouter) or any(router.config[key] != fresh.config[key] for key in same):
        expected = ", ".join(f"{key} {fresh.config[key]}" for key in same)
        raise ValueError(f"init {folder} holds a {type(router).__name__} that does not fit: this run needs {expected}")
    router.require_fit(model)
    return router
