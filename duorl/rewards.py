"""Rewards of routing decisions.

A reward gets one layer decision of all tokens at once. Your own reward is a class or, without options, a function. Use
its import path: `--reward my_package.MyReward --reward.bonus 0.1`:

    class MyReward(duorl.rewards.Reward):
        def __init__(self, bonus: float = 0.1): self.bonus = bonus
        def __call__(self, step): return self.bonus * (step.action == 1).float()

    def my_reward(step): return step.gain - 0.1 * step.compute

`duorl.testing.check_reward` checks it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from duorl.closeness import Closeness, minus_divergence, overlap, same_token
from duorl.costs import SKIP
from duorl.prices import check_price

_MOST = 1e15


@dataclass(frozen=True)
class Step:
    """One layer decision of N tokens in lockstep.

    Attributes:
        layer: index of the layer that was decided.
        action: (N,) int64, codes 0 skip, 1 small, 2 big.
        compute: (N,), compute of the action, as a share of an all-big pass.
        hidden: (N, d), the residual stream before the output of the chosen network was added.
        next_hidden: (N, d), the residual stream after that.
        last: true for the last layer.
        loss: (N,) nats, the token's loss; None before the last decision.
        reference_loss: (N,) nats, its loss in the same context under the reference route; None before the last.
        previous: the decision before this one, None at the first. Its own `previous` is None: an episode holds the
            states of two layers, not of all.
        lens: computes `lens_loss`; use that.
        closer: computes `teacher_gain`, `agreement_gain` and `overlap_gain`; use these.
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
    closer: Callable[[Closeness], Tensor] | None = field(default=None, repr=False)

    @cached_property
    def lens_loss(self) -> Tensor:
        """(N,) nats: loss of the prediction that the head makes from `next_hidden`; needs one pass of the head."""
        assert self.lens is not None
        return self.lens()

    @cached_property
    def teacher_gain(self) -> Tensor:
        """(N,) nats: KL(all-big || reference route) - KL(all-big || this route), of the predictions.

        Zeros before the last decision; needs one pass of the head and one all-big pass.
        """
        return self._closer(minus_divergence)

    @cached_property
    def agreement_gain(self) -> Tensor:
        """(N,): 1 where this route's most likely token is all-big's, minus the same of the reference route.

        Zeros before the last decision; costs as much as `teacher_gain`.
        """
        return self._closer(same_token)

    @cached_property
    def overlap_gain(self) -> Tensor:
        """(N,): by how much sampling accepts this route's token with a higher probability than the reference route's.

        Zeros before the last decision; costs as much as `teacher_gain`.
        """
        return self._closer(overlap)

    def _closer(self, closeness: Closeness) -> Tensor:
        if not self.last:
            return torch.zeros_like(self.compute)
        assert self.closer is not None
        return self.closer(closeness)

    @cached_property
    def relative_update(self) -> Tensor:
        """(N,): |next_hidden - hidden| / |hidden|, the relative change of the residual stream."""
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
    """Reward of one decision: a callable from a `Step` to (N,) rewards. `a + b` is the sum of two rewards."""

    def __call__(self, step: Step) -> Tensor:
        """(N,) rewards of one decision."""
        raise NotImplementedError(f"{type(self).__name__} must define __call__(self, step)")

    def contextual(self, step: Step) -> Tensor:
        """(N,): the part of the reward that depends on the routes of earlier tokens; by default 0.

        With a `token_discount` or `later_effects`, a learner credits earlier tokens with it. A reward that does not
        define it is then refused.
        """
        return torch.zeros_like(step.compute)

    @property
    def name(self) -> str:
        """Its name in messages and curves."""
        return type(self).__name__

    def __add__(self, other: Reward) -> Sum:
        return Sum([self, other])


class FunctionReward(Reward):
    """A plain function of a step as a reward; its `contextual` part is 0.

    Args:
        function: a function from a `Step` to (N,) rewards.
    """

    def __init__(self, function: Callable[[Step], Tensor]):
        self.function = function

    @property
    def name(self) -> str:
        """Name of the function."""
        return getattr(self.function, "__name__", type(self.function).__name__)

    def __call__(self, step: Step) -> Tensor:
        """(N,), result of the function."""
        return self.function(step)


def as_reward(reward: Reward | Callable[[Step], Tensor]) -> Reward:
    """Make a reward from a function of a step; a reward is returned unchanged.

    Raises:
        ValueError: the object is neither, for example a class in place of an object.
    """
    if isinstance(reward, Reward):
        return reward
    if isinstance(reward, type) or not callable(reward):
        raise ValueError(f"a reward is a Reward or a function of a step, not {reward!r}")
    return FunctionReward(reward)


class LossImprovement(Reward):
    """gain - price * compute, summed over an episode: the return that the oracle maximizes.

    Every decision has the reward -price * compute. The last one also has the gain: the reference loss of the token
    minus its loss. Losses of tokens differ much more than their gains, so agents learn better from the gain.

    Args:
        price: price of an all-big pass, in nats; at least 0.
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
    """Potential-based shaping by the loss of intermediate predictions: earlier credit, the same optimal policy.

    The potential of a state is minus the loss of the head's prediction from it, and 0 at both ends. So the rewards of
    an episode sum to 0 (Ng, Harada and Russell 1999, theorem 1, undiscounted).

    Args:
        scale: factor on the potential.
    """

    def __init__(self, scale: float = 1.0):
        self.scale = _finite("scale", scale)

    def __call__(self, step: Step) -> Tensor:
        """(N,) nats, times `scale`."""
        zero = torch.zeros_like(step.compute)
        before = zero if step.previous is None else -step.previous.lens_loss
        after = zero if step.last else -step.lens_loss
        return self.scale * (after - before)


class TeacherKL(Reward):
    """The default reward with the whole distribution of all-big in place of the label, or beside it.

    The label gives information about one token of the vocabulary, the distribution about all tokens. So the gains have
    less noise. But a router can then only become as good as all-big, and a good route can be better.

    Args:
        price: price of an all-big pass, in nats; at least 0.
        share: share of the gain that comes from the distance to all-big, in [0, 1]; the rest comes from the label.
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


class Acceptance(Reward):
    """For drafts: whether all-big would accept the token that this route makes most likely, minus price * compute.

    The gain is that over the reference route. Greedy acceptance is a step function of the route. So it has no
    derivatives: PPO and REINFORCE can learn from it, but ReinMax sees the price alone.

    Args:
        price: price of an all-big pass, in accepted tokens; at least 0.
        sampled: the probability that sampling accepts the token, sum of min(p, q), in place of greedy acceptance; it
            has derivatives.
    """

    def __init__(self, price: float = 0.1, sampled: bool = False):
        self.price, self.sampled = check_price(price), sampled

    def __call__(self, step: Step) -> Tensor:
        """(N,) accepted tokens."""
        return self.contextual(step) - self.price * step.compute

    def contextual(self, step: Step) -> Tensor:
        """(N,) accepted tokens: the gain."""
        return step.overlap_gain if self.sampled else step.agreement_gain


class RedundancyCharge(Reward):
    """Charges networks that ran and hardly changed the hidden state (after DynaLay, 2023).

    Args:
        charge: nats per redundant decision.
        threshold: a decision other than skip is redundant if its relative update |dh| / |h| is below this.
    """

    def __init__(self, charge: float = 0.01, threshold: float = 0.1):
        self.charge, self.threshold = _finite("charge", charge), _finite("threshold", threshold)

    def __call__(self, step: Step) -> Tensor:
        """(N,) nats: 0 or -charge."""
        redundant = (step.action != SKIP) & (step.relative_update < self.threshold)
        return -self.charge * redundant.to(step.compute.dtype)


class Sum(Reward):
    """The sum of several rewards.

    Args:
        rewards: the rewards, at least one.
    """

    def __init__(self, rewards: Sequence[Reward | Callable[[Step], Tensor]]):
        if not rewards:
            raise ValueError("a sum needs at least one reward")
        self.rewards = [as_reward(reward) for reward in rewards]

    def __call__(self, step: Step) -> Tensor:
        """(N,), sum of the rewards."""
        return torch.stack([checked(reward, step) for reward in self.rewards]).sum(0)

    def contextual(self, step: Step) -> Tensor:
        """(N,), sum over the rewards."""
        return checked_contextual(self, step)


def _finite(name: str, number: float) -> float:
    if not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number, not {number}")
    return number


def checked(reward: Reward, step: Step) -> Tensor:
    """Compute the reward of a step and check it, (N,) finite numbers of the step's type.

    Raises:
        ValueError: the reward fails, has another shape or is not finite; the message names the class and the layer.
    """
    return _checked(reward.name, reward, step)


def checked_contextual(reward: Reward, step: Step) -> Tensor:
    """The `contextual` part of a reward, (N,), checked part by part; errors as for `checked`."""
    parts = [_checked(f"{part.name}.contextual", part.contextual, step) for part in _flat(reward)]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def _checked(name: str, function: Callable[[Step], Tensor], step: Step) -> Tensor:
    try:
        earned = function(step)
    except (Exception, SystemExit) as error:  # a user's code may raise anything
        said = f"{type(error).__name__}: {error}"
        raise ValueError(f"{name} fails in layer {step.layer}: {said}") from error
    shape = tuple(step.compute.shape)
    if not isinstance(earned, Tensor) or earned.shape != shape:
        found = tuple(earned.shape) if isinstance(earned, Tensor) else type(earned).__name__
        raise ValueError(f"{name} must return one reward per token, shape (N,), not {found}, in layer {step.layer}")
    if earned.is_complex() or earned.device != step.compute.device:
        kind = f"{earned.dtype} on {earned.device}, in layer {step.layer}"
        raise ValueError(f"{name} must return real numbers on {step.compute.device}, not {kind}")
    if not earned.is_floating_point():
        earned = earned.to(step.compute.dtype)
    if (step.last or earned.device.type == "cpu") and not (earned.abs() < _MOST).all():  # NaN is not, either
        problem = "not finite" if not earned.isfinite().all() else f"beyond {_MOST:g}, which learners cannot square"
        raise ValueError(f"{name} returned a reward that is {problem}, in layer {step.layer}")
    return earned


def is_loss_improvement(reward: Reward) -> bool:
    """Whether the returns of a reward are those of `LossImprovement`: shaping by potentials does not change them."""
    kinds = [type(part) for part in _flat(reward)]
    return kinds.count(LossImprovement) == 1 and set(kinds) <= {LossImprovement, LogitLensShaping}


def is_contextual(reward: Reward) -> bool:
    """Whether a reward, or a part of a sum, declares what depends on the routes of earlier tokens."""
    return any(type(part).contextual is not Reward.contextual for part in _flat(reward))


def named_parts(reward: Reward) -> dict[str, Reward]:
    """The parts of a sum by name, with numbers if names repeat; empty for other rewards."""
    if not isinstance(reward, Sum):
        return {}
    parts: dict[str, Reward] = {}
    for part in _flat(reward):
        same = sum(other.name == part.name for other in parts.values())
        parts[f"{part.name}-{same + 1}" if same else part.name] = part
    return parts


def _flat(reward: Reward) -> list[Reward]:
    """The parts of a sum, also of sums inside it."""
    return [part for each in reward.rewards for part in _flat(each)] if isinstance(reward, Sum) else [reward]


def price_of(reward: Reward) -> float:
    """The price of a reward, in nats per all-big pass: the sum over its parts, 0 if none has a price."""
    return sum(_price(part) for part in _priced(reward))


def _price(part: Any) -> float:
    """A part's price; errors name the part."""
    try:
        return check_price(float(part.price))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{part.name}: price must be at least 0 nats per all-big pass, not {part.price!r}") from error


def with_price(reward: Reward) -> tuple[Reward, Callable[[float | Tensor], None]]:
    """A reward whose price can be changed while it is in use.

    Args:
        reward: a reward with an attribute `price`, or a sum with exactly one such part; it does not change.

    Returns:
        A copy, and a function that sets its price: a number, or (N,), one per token.

    Raises:
        ValueError: there is no price, or more than one.
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
