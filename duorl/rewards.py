"""Rewards: what a routing decision is worth.

A reward sees one layer decision for all tokens at once. One of your own is a class or, without options, a function, and
is named by its import path, `--reward my_package.MyReward --reward.bonus 0.1`:

    class MyReward(duorl.rewards.Reward):
        def __init__(self, bonus: float = 0.1): self.bonus = bonus
        def __call__(self, step): return self.bonus * (step.action == 1).float()

    def my_reward(step): return step.gain - 0.1 * step.compute

`duorl.testing.check_reward` tries it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from duorl.costs import SKIP
from duorl.prices import check_price


@dataclass(frozen=True)
class Step:
    """One layer decision of N tokens in lockstep.

    Attributes:
        layer: index of the layer that was decided.
        action: (N,) int64, codes 0 skip, 1 small, 2 big.
        compute: (N,), what the action costs, as a share of an all-big pass.
        hidden: (N, d), the residual stream before the chosen network's output joined it.
        next_hidden: (N, d), after.
        last: this was the last layer.
        loss: (N,) nats, the token's loss; None before the last decision.
        reference_loss: (N,) nats, its loss in the same context under the reference route; None before the last.
        previous: the decision before this one, None at the first. Its own `previous` is None: an episode holds the
            states of two layers, not of all.
        lens: computes `lens_loss`; use that.
        distance: computes `teacher_gain`; use that.
    """

    layer: int
    action: Tensor
    compute: Tensor
    hidden: Tensor
    next_hidden: Tensor
    last: bool
    loss: Tensor | None = None
    reference_loss: Tensor | None = None
    previous: Step | None = field(default=None, repr=False)
    lens: Callable[[], Tensor] | None = field(default=None, repr=False)
    distance: Callable[[], Tensor] | None = field(default=None, repr=False)

    @cached_property
    def lens_loss(self) -> Tensor:
        """(N,) nats: the loss of the prediction that the head would make from `next_hidden`; costs a head once."""
        assert self.lens is not None
        return self.lens()

    @cached_property
    def teacher_gain(self) -> Tensor:
        """(N,) nats: how much closer than the reference route's the prediction is to all-big's, by KL(all-big || .).

        Zeros before the last decision; costs a head and an all-big pass once.
        """
        if not self.last:
            return torch.zeros_like(self.compute)
        assert self.distance is not None
        return self.distance()

    @cached_property
    def relative_update(self) -> Tensor:
        """(N,): |next_hidden - hidden| / |hidden|, what the chosen network did to the residual stream."""
        return (self.next_hidden - self.hidden).norm(dim=-1) / self.hidden.norm(dim=-1)

    def forgetful(self) -> Step:
        """This step, which lets go of the one before it."""
        object.__setattr__(self, "previous", None)
        return self

    @property
    def gain(self) -> Tensor:
        """(N,) nats: reference loss - loss; zeros before the last decision."""
        if self.loss is None or self.reference_loss is None:
            return torch.zeros_like(self.compute)
        return self.reference_loss - self.loss


class Reward:
    """What one decision earns: a callable from a `Step` to (N,) rewards. Rewards add with `+`."""

    def __call__(self, step: Step) -> Tensor:
        """(N,) rewards of one decision."""
        raise NotImplementedError(f"{type(self).__name__} must define __call__(self, step)")

    def contextual(self, step: Step) -> Tensor:
        """(N,): the part of the reward that routes of earlier tokens of the window can change, 0 unless defined.

        With a `token_discount` a learner is credited with it for later tokens too.
        """
        return torch.zeros_like(step.compute)

    @property
    def name(self) -> str:
        """What messages and curves call it."""
        return type(self).__name__

    def __add__(self, other: Reward) -> Sum:
        return Sum([self, other])


class FunctionReward(Reward):
    """A plain function of a step as a reward; it has no part that earlier tokens are credited with.

    Args:
        function: from a `Step` to (N,) rewards.
    """

    def __init__(self, function: Callable[[Step], Tensor]):
        self.function = function

    @property
    def name(self) -> str:
        """The function's."""
        return getattr(self.function, "__name__", type(self.function).__name__)

    def __call__(self, step: Step) -> Tensor:
        """(N,), the function's."""
        return self.function(step)


def as_reward(reward: Reward | Callable[[Step], Tensor]) -> Reward:
    """A reward as it is; a function of a step as a reward.

    Raises:
        ValueError: it can be neither, a class that was not called for instance.
    """
    if isinstance(reward, Reward):
        return reward
    if isinstance(reward, type) or not callable(reward):
        raise ValueError(f"a reward is a Reward or a function of a step, not {reward!r}")
    return FunctionReward(reward)


class LossImprovement(Reward):
    """gain - price * compute, summed over an episode: the return that the oracle maximizes.

    Every decision costs its compute; the last one also earns the gain, the improvement of the token's loss over
    the reference route's. The paired reference matters: token losses spread far more than gains.

    Args:
        price: what an all-big pass costs, in nats; at least 0.
    """

    def __init__(self, price: float = 0.1):
        self.price = check_price(price)

    def __call__(self, step: Step) -> Tensor:
        """(N,) nats."""
        return step.gain - self.price * step.compute

    def contextual(self, step: Step) -> Tensor:
        """(N,) nats: the gain."""
        return step.gain


class LogitLensShaping(Reward):
    """Potential-based shaping by the intermediate prediction's loss: earlier credit, the same optimal policy.

    The potential of a state is minus the loss of what the head would predict there, and 0 at both ends, so
    the rewards of an episode sum to 0 (Ng, Harada and Russell 1999, theorem 1, undiscounted).

    Args:
        scale: factor on the potential.
    """

    def __init__(self, scale: float = 1.0):
        self.scale = scale

    def __call__(self, step: Step) -> Tensor:
        """(N,) nats, times `scale`."""
        zero = torch.zeros_like(step.compute)
        before = zero if step.previous is None else -step.previous.lens_loss
        after = zero if step.last else -step.lens_loss
        return self.scale * (after - before)


class TeacherKL(Reward):
    """The default reward with all-big's whole distribution in place of the label, or beside it.

    A label says of one token in a vocabulary whether a route was good; the teacher says it of all, so that gains
    spread less. But a router can then only be as good as all-big, which a good route beats.

    Args:
        price: what an all-big pass costs, in nats; at least 0.
        share: of the gain that is measured by the distance to all-big; the rest is the label's, in [0, 1].
    """

    def __init__(self, price: float = 0.1, share: float = 1.0):
        if not 0 <= share <= 1:
            raise ValueError(f"share must be in [0, 1], not {share}")
        self.price, self.share = check_price(price), share

    def __call__(self, step: Step) -> Tensor:
        """(N,) nats."""
        return self.contextual(step) - self.price * step.compute

    def contextual(self, step: Step) -> Tensor:
        """(N,) nats: the gain."""
        return self.share * step.teacher_gain + (1 - self.share) * step.gain


class RedundancyCharge(Reward):
    """Charges networks that ran and hardly changed the token's state (after DynaLay, 2023).

    Args:
        charge: nats per redundant decision.
        threshold: a decision other than skip is redundant where its relative update |dh| / |h| is below this.
    """

    def __init__(self, charge: float = 0.01, threshold: float = 0.1):
        self.charge, self.threshold = charge, threshold

    def __call__(self, step: Step) -> Tensor:
        """(N,) nats: 0 or -charge."""
        redundant = (step.action != SKIP) & (step.relative_update < self.threshold)
        return -self.charge * redundant.to(step.compute.dtype)


class Sum(Reward):
    """The sum of several rewards.

    Args:
        rewards: at least one.
    """

    def __init__(self, rewards: Sequence[Reward | Callable[[Step], Tensor]]):
        if not rewards:
            raise ValueError("a sum needs at least one reward")
        self.rewards = [as_reward(reward) for reward in rewards]

    def __call__(self, step: Step) -> Tensor:
        """(N,), the rewards added up."""
        return torch.stack([reward(step) for reward in self.rewards]).sum(0)

    def contextual(self, step: Step) -> Tensor:
        """(N,), the parts' added up."""
        return torch.stack([reward.contextual(step) for reward in self.rewards]).sum(0)


def checked(reward: Reward, step: Step) -> Tensor:
    """What a reward says of a step, (N,) numbers.

    Raises:
        ValueError: it says something else; names the class and the layer.
    """
    earned = reward(step)
    name, shape = reward.name, tuple(step.compute.shape)
    if not isinstance(earned, Tensor) or earned.shape != shape:
        found = tuple(earned.shape) if isinstance(earned, Tensor) else type(earned).__name__
        raise ValueError(f"{name} must return one reward per token, shape (N,), not {found}")
    if not earned.is_floating_point():
        earned = earned.to(step.compute.dtype)
    if not earned.isfinite().all():
        raise ValueError(f"{name} returned a reward that is not finite, in layer {step.layer}")
    return earned


def named_parts(reward: Reward) -> dict[str, Reward]:
    """The parts of a sum by name, numbered where several have one; none of another reward."""
    if not isinstance(reward, Sum):
        return {}
    parts: dict[str, Reward] = {}
    for part in _flat(reward):
        same = sum(other.name == part.name for other in parts.values())
        parts[f"{part.name}-{same + 1}" if same else part.name] = part
    return parts


def _flat(reward: Reward) -> list[Reward]:
    """The parts of a sum, those of sums in it too."""
    return [part for each in reward.rewards for part in _flat(each)] if isinstance(reward, Sum) else [reward]


def price_of(reward: Reward) -> float:
    """The price of compute inside a reward, in nats per all-big pass: its parts' sum, 0 where none has a price."""
    return sum(float(part.price) for part in _priced(reward))


def with_price(reward: Reward) -> tuple[Reward, Callable[[float | Tensor], None]]:
    """A reward whose price can be changed while it is in use.

    Args:
        reward: has an attribute `price`, or is a sum of which one part has; it stays as it is.

    Returns:
        A copy, and what sets its price: a number, or (N,), one per token.

    Raises:
        ValueError: there is no price to change, or more than one.
    """
    reward = copy.deepcopy(reward)
    priced = _priced(reward)
    if len(priced) != 1:
        raise ValueError(
            f"{type(reward).__name__} has {len(priced) or 'no'} prices: to vary the price one part of the reward, "
            "and one alone, must have an attribute `price`"
        )
    return reward, partial(setattr, priced[0], "price")


def _priced(reward: Reward) -> list[Any]:
    """The parts that have a price."""
    return [part for part in _flat(reward) if hasattr(part, "price")]
