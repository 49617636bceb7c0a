"""Learner: what trains a router, by reinforcement or without.

All learners are made from a `Task`, the text and the rules that a `duorl.envs.Lockstep` holds, and their own options:

    learner = duorl.learners.Soft(env)
    router = learner.learn(total_decisions=1_000_000)        # again: goes on

A learner of your own defines `update`, and names in `stateful` what its training changes beside the router:

    class Mine(duorl.learners.HeadLearner):
        def update(self):                                    # one step of training
            ...
            return {"train/loss": loss.item()}               # metrics by TensorBoard tag

`duorl.testing.check_learner` tries it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from duorl.models.frozen import require_frozen
from duorl.routers import HeadRouter, PatternRouter, Router, load
from duorl.routers.fit import identity
from duorl.routers.heads import LayerHeads

if TYPE_CHECKING:
    from duorl.models import DuoForCausalLM

Monitor = Callable[[int, dict[str, float], Router], None]
"""Called after every update with the layer decisions so far, metrics by TensorBoard tag, and the router."""

State = dict[str, Any]
"""Nested dictionaries, lists, numbers and strings with tensors in them: what a checkpoint holds."""


class Task(Protocol):
    """What is learned, and on what text. `duorl.envs.Lockstep` is one.

    Attributes:
        model: a frozen duo model of L layers.
        windows: (W, T+1), text of the router split.
        actions: names of the allowed actions, cheapest first.
        prices: lowest and highest price, where the router shall answer for a range of them.
        charged: nats per all-big pass, where there is one price.
        inputs: names of the router's further inputs.
        big_layers: a hard budget: so many layers of every token must be big.
        first_seed: of everything random.
        windows_per_batch: windows in lockstep, B.
        num_tokens: tokens in lockstep.
        layers: L.
    """

    model: DuoForCausalLM
    windows: Tensor
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

    Learners report the same tags over the same axis, layer decisions (docs/metrics.md), so that their curves lie over
    each other.

    Args:
        env: the task; its seed starts everything random.

    Attributes:
        router: what is trained.
        decisions: layer decisions learned from so far.
        planned: those asked for so far, by all calls of `learn`; what changes over a training, rates for instance,
            follows `progress`, their quotient.
        stateful: names of the attributes that training changes, beside the router: modules, optimizers, generators,
            tensors, numbers, lists of these. They are saved and restored with it.

    Raises:
        ValueError: the model has a trainable parameter.
    """

    router: Router
    stateful: tuple[str, ...] = ()

    def __init__(self, env: Task):
        require_frozen(env.model)
        self.env = env
        self.decisions = 0
        self.planned = 0

    @property
    def decisions_per_update(self) -> int:
        """Layer decisions that one update learns from: all layers of all tokens."""
        return self.env.layers * self.env.num_tokens

    @property
    def progress(self) -> float:
        """The share of the planned decisions that is done, in [0, 1]."""
        return self.decisions / self.planned if self.planned else 0.0

    @abstractmethod
    def update(self) -> dict[str, float]:
        """One step of training; returns its metrics by TensorBoard tag."""

    def learn(self, total_decisions: int, monitor: Monitor | None = None) -> Router:
        """Train for so much longer.

        Args:
            total_decisions: layer decisions to learn from, rounded up to whole updates.
            monitor: told after every update.

        Returns:
            The trained router, frozen.
        """
        self.planned += self.span(total_decisions)
        return self.go_on(monitor)

    def span(self, total_decisions: int) -> int:
        """Decisions that a call of `learn` adds to the plan; learners whose own options bound them know better."""
        return total_decisions

    def go_on(self, monitor: Monitor | None = None) -> Router:
        """Train until what was planned is done: after `restore`, the rest of it."""
        self.router.train().requires_grad_(True)
        while self.decisions < self.planned:
            metrics = self.update()
            self.decisions += self.decisions_per_update
            if monitor:
                monitor(self.decisions, metrics, self.router)
        self.router.trained_for = identity(self.env.model)
        return self.router.eval().requires_grad_(False)

    def charge(self, price: float) -> None:
        """Let an all-big pass cost this from now on.

        Raises:
            ValueError: the task's reward has no price to change.
        """
        self.env.charge(price)

    def state(self) -> State:
        """All that is needed to go on to the same bit, after any update."""
        parts = {name: _state_of(getattr(self, name)) for name in self.stateful}
        router = dict(self.router.state_dict())
        counters = {"decisions": self.decisions, "planned": self.planned}
        return {**counters, "router": router, "env": self.env.state(), "parts": parts}

    def restore(self, state: State) -> None:
        """Take over the state of a learner of the same task and options."""
        self.decisions, self.planned = state["decisions"], state["planned"]
        self.router.load_state_dict(state["router"])
        self.env.restore(state["env"])
        for name in self.stateful:
            _restore(self, name, state["parts"][name])


def _is_part(value: Any) -> bool:
    """It keeps its identity when it is restored."""
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
    """Parts take over their state, plain values are replaced."""
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
    """A learner of a `HeadRouter`, by Adam at a rate that falls linearly to 0 over what is planned.

    Args:
        env: the task; its seed also starts the weights.
        learning_rate: of Adam, at the start.
        width: hidden units of a head; 0 for linear heads.
        init: folder of a saved router to start from, whose sizes then count; None for a fresh one.

    Attributes:
        optimizer: of the router's weights.

    Raises:
        ValueError: the saved router is not one of heads for this task.
    """

    router: HeadRouter
    stateful: tuple[str, ...] = ("optimizer",)

    def __init__(self, env: Task, *, learning_rate: float, width: int = 0, init: str | None = None):
        super().__init__(env)
        if not 0 < learning_rate < math.inf:
            raise ValueError(f"learning_rate must be above 0, not {learning_rate}")
        fresh = self.fresh(width, env.first_seed)
        self.router = (fresh if init is None else _saved(init, fresh, env.model)).to(env.model.device)
        self.learning_rate = learning_rate
        self.optimizer = torch.optim.Adam(self.router.parameters(), lr=learning_rate)

    def fresh(self, width: int, seed: int) -> HeadRouter:
        """An untrained router for the task."""
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
        """Fresh heads with one output on what the router sees, their weights among those that are optimized."""
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
        """The learning rate now."""
        return self.learning_rate * (1 - self.progress)

    def descend(self, loss: Tensor) -> None:
        """One gradient step at the present rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        self.optimizer.zero_grad()
        loss.backward()
        for parameter in self.optimizer.param_groups[0]["params"]:
            if parameter.grad is not None and not parameter.grad.isfinite().all():
                name = type(self).__name__
                raise ValueError(f"{name}: a gradient is not finite after {self.decisions} decisions: check the reward")
        self.optimizer.step()


def _saved(folder: str, fresh: HeadRouter, model: DuoForCausalLM) -> HeadRouter:
    """The router in a folder, where it can take the fresh one's place."""
    router = load(folder)
    if isinstance(router, PatternRouter):
        return fresh.leaning(router.config["route"])
    same = ("layers", "hidden_size", "actions", "prices", "inputs")
    if not isinstance(router, HeadRouter) or any(router.config[key] != fresh.config[key] for key in same):
        expected = ", ".join(f"{key} {fresh.config[key]}" for key in same)
        raise ValueError(f"init {folder} holds a {type(router).__name__} that does not fit: this run needs {expected}")
    router.require_fit(model)
    return router
