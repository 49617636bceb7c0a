"""The supervised router learns the values of actions from labels (`duorl.learners.labels`)."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from duorl.checks import require_positive
from duorl.inputs import Inputs, View
from duorl.learners.base import HeadLearner, Learner, Task
from duorl.learners.labels import Decisions, Deviations, label
from duorl.learners.sources import Source, require_stored
from duorl.oracle import RouteTable
from duorl.paths import RouterPath
from duorl.prices import ladder
from duorl.routers import HeadRouter

Target = Literal["action", "soft", "value", "cost"]


class Labels:
    """Labelled decisions. They are made at their first use, and again if the price changes.

    Args:
        env: the task.
        windows: number of windows to label, the first ones of the text.
        temperature: temperature of values and routes, in nats.
        rungs: number of labelled prices, evenly spaced in the range on a log scale.
        base: the base policy of deviations, see `duorl.learners.sources.Source`.

    Raises:
        ValueError: a count is below 1, the base policy cannot be used, or the labels do not fit into memory.
    """

    def __init__(self, env: Task, *, windows: int, temperature: float, rungs: int, base: RouterPath | None = None):
        require_positive(windows=windows, rungs=rungs)
        self.env, self.temperature, self.rungs = env, temperature, rungs
        self.source, self.text = Source(env.model, env.actions, base), env.windows[:windows]
        self.source.require(self.text)
        require_stored(env, self.count, windows)
        self._found: RouteTable | Deviations | None = None
        self._made: tuple[float, Decisions] | None = None

    @property
    def prices(self) -> list[float]:
        """The P labelled prices."""
        return [self.env.charged] if self.env.prices is None else ladder(self.env.prices, self.rungs)

    @property
    def count(self) -> int:
        """N, the number of labelled routes."""
        tokens = self.text[:, 1:].numel()
        return tokens * self.rounds

    @property
    def rounds(self) -> int:
        """Labelled routes of every token: one per price if all are searched, else one."""
        return len(self.prices) if self.source.searches else 1

    def decisions(self) -> Decisions:
        """All labelled decisions, at the current price."""
        if self._made is None or self._made[0] != self.env.charged:
            self._made = self.env.charged, self._priced()
        return self._made[1]

    def _priced(self) -> Decisions:
        """The search or the deviations are made once, and priced again if the price changes."""
        prices, inputs = self.prices, Inputs(self.env.inputs)
        generator = torch.Generator().manual_seed(self.env.first_seed)
        if self._found is None:
            self._found = self.source.table(self.text) or self.source.deviations(self.text, prices, generator, inputs)
        if isinstance(self._found, Deviations):
            return self._found.decisions(None if self.env.prices else prices[0])
        return label(
            self.env.model,
            self.text,
            self._found,
            prices=prices,
            temperature=self.temperature,
            generator=generator,
            inputs=inputs,
        )


class Taught(Learner):
    """Base of learners from labels: `learn` always makes `epochs` passes, for any number of decisions.

    Attributes:
        labels: the labelled decisions.
    """

    honours = frozenset({"prices"})
    labels: Labels
    epochs: int

    def prepare(
        self,
        *,
        windows: int,
        target: Target,
        temperature: float,
        rungs: int,
        epochs: int,
        batch_size: int,
        base: RouterPath | None,
    ) -> None:
        """Set the options; see `Supervised`."""
        require_positive(epochs=epochs, batch_size=batch_size)
        check_target(target, temperature)
        self.target, self.temperature, self.epochs, self.batch_size = target, temperature, epochs, batch_size
        walked_at = 0.0 if target == "action" else temperature
        self.labels = Labels(self.env, windows=windows, temperature=walked_at, rungs=rungs, base=base)

    @property
    def decisions_per_update(self) -> int:
        """Number of labelled decisions."""
        return self.env.layers * self.labels.count

    def span(self, total_decisions: int) -> int:
        """All epochs."""
        return self.epochs * self.decisions_per_update


class Supervised(Taught, HeadLearner):
    """Trains heads on the values of actions, in passes over labelled text.

    `learn` always makes `epochs` passes, for any number of decisions. An update is one pass.

    Args:
        env: the task; its seed also starts the weights, the random routes and the order of the decisions.
        windows: number of windows to label.
        target: `action`: learn the best action; `soft`: the distribution softmax(values / temperature); `value`: the
            differences of the values, by squared error; `cost`: minimize the mean loss of value (cost-sensitive
            classification).
        temperature: temperature of values and routes, in nats; 0 for `action`.
        rungs: number of labelled prices, evenly spaced in the range on a log scale.
        epochs: passes over the labelled decisions.
        batch_size: decisions per gradient step.
        learning_rate: learning rate of Adam; it is constant.
        width: hidden units of a head; 0 for a linear map.
        base: make labels by deviations from the routes of this policy: `random`, the name of an action, or the folder
            of a saved router; or take them from a folder that `duorl label` made. By default, all routes are searched
            if there are at most 1,024; else `random`.
        init: folder of a saved router to start from.

    Raises:
        ValueError: a count is below 1, the target is unknown, or the temperature is not above 0.
    """

    stateful = ("optimizer", "generator")

    def __init__(
        self,
        env: Task,
        *,
        windows: int = 64,
        target: Target = "cost",
        temperature: float = 1.0,
        rungs: int = 5,
        epochs: int = 5,
        batch_size: int = 4096,
        learning_rate: float = 3e-3,
        width: int = 0,
        base: RouterPath | None = None,
        init: RouterPath | None = None,
    ):
        super().__init__(env, learning_rate=learning_rate, width=width, init=init)
        taught = {"windows": windows, "rungs": rungs, "epochs": epochs, "batch_size": batch_size}
        self.prepare(target=target, temperature=temperature, base=base, **taught)
        self.generator = torch.Generator().manual_seed(env.first_seed)

    @property
    def rate(self) -> float:
        """The learning rate; it is constant."""
        return self.learning_rate

    def update(self) -> dict[str, float]:
        """One pass over the labelled decisions; returns its metrics by tag."""
        losses = []
        for index in shuffled(self.labels.count, max(1, self.batch_size // self.env.layers), self.generator):
            decisions = self.labels.decisions()
            loss = taught_loss(self.router, decisions, index, target=self.target, temperature=self.temperature)
            self.descend(loss)
            losses.append(loss.item())
        return {"train/loss": sum(losses) / len(losses)}


def check_target(target: str, temperature: float) -> None:
    """Refuse an unknown target or a bad temperature.

    Raises:
        ValueError: the message names it.
    """
    if target not in get_args(Target):
        raise ValueError(f"unknown target {target!r}: choose from {', '.join(get_args(Target))}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0 nats, not {temperature}")


def shuffled(count: int, size: int, generator: torch.Generator, pool: Tensor | None = None) -> tuple[Tensor, ...]:
    """Indices of routes in a random order, in batches, at least one route in each.

    Args:
        count: number of routes.
        size: routes per batch.
        generator: draws the order.
        pool: the routes to use; a bootstrap sample repeats some. By default all.
    """
    pool = torch.arange(count) if pool is None else pool
    return pool[torch.randperm(len(pool), generator=generator)].split(max(1, size))


def taught_loss(
    router: HeadRouter, decisions: Decisions, index: Tensor, *, target: Target, temperature: float
) -> Tensor:
    """Mean loss of a target over the decisions of some routes, a scalar."""
    logits = []
    for layer in range(len(decisions.hidden)):
        listed = None if decisions.inputs is None else decisions.inputs[layer, index]
        hidden, compute = decisions.hidden[layer, index], decisions.compute[layer, index]
        view = View(hidden, layer, compute, price=decisions.price[index])
        logits.append(router.heads(hidden, layer, compute, router.inputs.joined(view, listed)))
    return target_loss(torch.stack(logits), decisions.values[:, index], target=target, temperature=temperature)


def target_loss(logits: Tensor, values: Tensor, *, target: Target, temperature: float) -> Tensor:
    """Mean loss of a target over decisions.

    Args:
        logits: (..., A), the heads' outputs.
        values: (..., A), nats.
        target: see `Supervised`.
        temperature: temperature of `soft`, in nats.
    """
    logits, values = logits.flatten(0, -2), values.flatten(0, -2)
    if target == "action":
        return cross_entropy(logits, values.argmax(-1))
    if target == "soft":
        return cross_entropy(logits, (values / temperature).softmax(-1))
    values = _centred(values)  # only differences between actions matter
    if target == "value":
        return (_centred(logits) - values).square().sum(-1).mean()
    return -(logits.softmax(-1) * values).sum(-1).mean()


def _centred(numbers: Tensor) -> Tensor:
    return numbers - numbers.mean(-1, keepdim=True)
