"""The dynamics of routing, over tensors. The environments for Gymnasium and Stable-Baselines3 use it.

All episodes have L steps. So any number of tokens can go through the model in lockstep, one layer per step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from duorl.closeness import Closeness
from duorl.costs import ACTIONS, BIG, SMALL, action_ids
from duorl.envs.outcome import Outcome
from duorl.inputs import Inputs, View
from duorl.models.frozen import require_frozen
from duorl.rewards import (
    LossImprovement,
    Reward,
    Step,
    as_reward,
    checked,
    checked_contextual,
    named_parts,
    price_of,
    with_price,
)
from duorl.routed_pass import Context, RoutedPass, remember

if TYPE_CHECKING:
    from duorl.models import DuoForCausalLM


class RoutingDynamics:
    """Tokens in lockstep through a frozen duo model: `reset`, then L times `step`.

    Args:
        model: a frozen duo model.
        reward: a `Reward` or a plain function of a `Step`; by default `LossImprovement()`.
        actions: names of the A allowed actions; a choice is an index into them, cheapest action first.
        context: `routed` or `reference`, see `duorl.routed_pass`.
        group_size: number of copies of every window, K; the token axis is (K, B, P), flattened.
        reference: the action of the reference route, in every layer; its loss is the reference loss of the gain.
        prices: lowest and highest price. Every window of an episode then has its own price, given to `reset`; it
            replaces the price of the reward and is an input of the router. None: the price of the reward.
        inputs: names of the router's further inputs, see `duorl.inputs`.
        big_layers: hard budget: exactly this number of layers of every route must be big; see `action_masks`.

    Raises:
        ValueError: a parameter of the model is trainable, an action or an input is unknown, the reward has no price to
            vary, or the budget cannot be met.
    """

    def __init__(
        self,
        model: DuoForCausalLM,
        *,
        reward: Reward | Callable[[Step], Tensor] | None = None,
        actions: Sequence[str] = ("small", "big"),
        context: Context = "routed",
        group_size: int = 1,
        reference: str = "small",
        prices: Sequence[float] | None = None,
        inputs: Sequence[str] = (),
        big_layers: int | None = None,
    ):
        require_frozen(model)
        self.model = model
        self.reward = as_reward(reward or LossImprovement())
        self._inputs = Inputs(inputs, prices)
        self.inputs, self.prices = self._inputs.names, self._inputs.prices
        self._charged = price_of(self.reward)
        self._set_price: Callable[[float | Tensor], None] | None = None
        if self.prices is not None:
            self._set(self.prices[0])  # refuses a reward without a price now
        self.codes = action_ids(actions).to(model.device)
        self._codes = self.codes.tolist()
        self.actions = tuple(ACTIONS[code] for code in self._codes)
        self.context: Context = context
        self.group_size = group_size
        self.reference = int(action_ids([reference]))
        self.layers = model.num_layers
        self.layer = self.layers
        self.big_layers = big_layers
        if big_layers is not None and not (0 <= big_layers <= self.layers and {SMALL, BIG} <= set(self._codes)):
            raise ValueError(
                f"big_layers must be in 0 to {self.layers} and needs the actions small and big, not {big_layers} of "
                f"{', '.join(self.actions)}"
            )

    @torch.no_grad()
    def reset(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        price: Tensor | None = None,
        reference_loss: Tensor | None = None,
    ) -> None:
        """Begin an episode.

        Args:
            tokens: (B, T+1) windows.
            positions: (B, P), the tokens to route, in the reference context; by default all T.
            price: (B,), the price of each window, if prices vary.
            reference_loss: (B, P) nats, if it is already known.
        """
        tokens = tokens.to(self.model.device)
        positions = None if positions is None else positions.to(self.model.device)
        memory = remember(self.model, tokens, positions) if self.context == "reference" else None
        self._begin = partial(RoutedPass, self.model, tokens, context=self.context, memory=memory)
        self._reference: RoutedPass | None = None
        self._all_big: RoutedPass | None = None
        if reference_loss is None:
            reference_loss = self._reference_pass().losses()
        self.reference_loss = reference_loss.repeat(self.group_size, 1).flatten()
        self._walk = self._begin(copies=self.group_size, price=self._each_price(price, reference_loss))
        self._big = torch.zeros_like(self.compute, dtype=torch.int64)
        self._last_step: Step | None = None
        self._actions: list[Tensor] = []
        self._rewards: list[Tensor] = []
        self._parts: dict[str, list[Tensor]] = {name: [] for name in named_parts(self.reward)}
        self.layer = 0

    def _each_price(self, price: Tensor | None, like: Tensor) -> Tensor | None:
        """Give the reward the price of every window; returns the price of every token, (K * B, P)."""
        if self.prices is None:
            return None
        if price is None:
            raise ValueError("prices vary: give reset the price of each window")
        every = price.to(like.device)[:, None].expand_as(like).repeat(self.group_size, 1)
        self._set(every.flatten())
        return every

    @property
    def charged(self) -> float:
        """The price of an all-big pass in nats, if all tokens have the same; 0 if the reward has no price."""
        return self._charged

    def charge(self, price: float) -> None:
        """Set the price of an all-big pass, in this environment only.

        Raises:
            ValueError: the reward has no price to change.
        """
        self._charged = price
        self._set(price)

    def _set(self, price: float | Tensor) -> None:
        if self._set_price is None:
            self.reward, self._set_price = with_price(self.reward)
        self._set_price(price)

    @property
    def hidden(self) -> Tensor:
        """(N, d), input of the next FFN; after the last layer, the final residual stream."""
        return self._walk.hidden.flatten(0, 1)

    @property
    def compute(self) -> Tensor:
        """(N,), compute so far, in [0, 1]."""
        return self._walk.compute.flatten()

    @property
    def view(self) -> View:
        """The view of a router on the N tokens."""
        return self._walk.view.by_token()

    @property
    def features(self) -> Tensor | None:
        """(N, C), the router's further inputs; None if there are none."""
        return self._inputs(self.view) if self.num_features else None

    @cached_property
    def num_features(self) -> int:
        """Number of further inputs, C; see `features`."""
        return self._inputs.width(self.model.hidden_size)

    def action_masks(self) -> Tensor:
        """(N, A) bool: the choices that still allow the budget of big layers; all choices without a budget.

        Raises:
            RuntimeError: the episode is over.
        """
        if self.done:
            raise RuntimeError("the episode is over: call reset")
        masks = torch.ones(len(self.compute), len(self.codes), dtype=torch.bool, device=self.codes.device)
        if self.big_layers is not None:
            missing = self.big_layers - self._big
            masks[missing == 0] = self.codes != BIG
            masks[missing == self.layers - self.layer] = self.codes == BIG
        return masks

    @property
    def done(self) -> bool:
        """Whether all layers are decided."""
        return self.layer == self.layers

    def step(self, choice: Tensor, weights: Tensor | None = None) -> Tensor:
        """Decide one layer.

        Args:
            choice: (N,) int64, indexes `actions`.
            weights: (N, A), the choice as zeros and ones. Rewards then have derivatives by the weights, and all
                networks run. None: only the chosen networks run, without gradients.

        Returns:
            (N,) rewards.
        """
        with torch.set_grad_enabled(weights is not None):
            return self._step(choice, weights)

    def _step(self, choice: Tensor, weights: Tensor | None) -> Tensor:
        if self.done:
            raise RuntimeError("the episode is over: call reset")
        walk, actions = self._walk, self.codes[choice]
        hidden, before = walk.residual.flatten(0, 1), self.compute
        self._big += actions == BIG
        if weights is None:
            walk.step(actions.view_as(walk.compute))
        else:
            walk.mix(weights.unflatten(0, walk.compute.shape), self._codes, hard=True)
        self.layer += 1
        last = walk.done
        step = Step(
            layer=self.layer - 1,
            action=actions,
            compute=self.compute - before,
            hidden=hidden,
            next_hidden=walk.layer_input.flatten(0, 1),
            last=last,
            loss=walk.losses().flatten() if last else None,
            reference_loss=self.reference_loss if last else None,
            previous=self._last_step and self._last_step.forgetful(),
            lens=partial(_lens, walk, walk.layer_input),
            closer=self._closer if last else None,
        )
        self._last_step = step
        self._actions.append(actions)
        self._rewards.append(self._earned(step))
        return self._rewards[-1]

    def _earned(self, step: Step) -> Tensor:
        """(N,) rewards; if the reward is a sum, the rewards of its parts are stored."""
        if not self._parts:
            return checked(self.reward, step)
        for name, part in named_parts(self.reward).items():
            self._parts[name].append(checked(part, step))
        return torch.stack([earned[-1] for earned in self._parts.values()]).sum(0)

    def _reference_pass(self) -> RoutedPass:
        """The finished pass along the reference route, computed once per episode."""
        if self._reference is None:
            self._reference = self._constant(self.reference)
        return self._reference

    def _all_big_pass(self) -> RoutedPass:
        """The finished pass in which all tokens take big, computed once per episode."""
        if self._all_big is None:
            self._all_big = self._constant(BIG)
        return self._all_big

    def _constant(self, action: int) -> RoutedPass:
        """A finished pass in which all tokens take one action."""
        return self._begin().take_all(action)

    def _closer(self, closeness: Closeness) -> Tensor:
        """(N,); see `Step.closer`."""
        teacher = self._all_big_pass()
        reference = self._reference_pass().compare(teacher, closeness).repeat(self.group_size, 1)
        return (self._walk.compare(teacher, closeness) - reference).flatten()

    @property
    def last_step(self) -> Step:
        """The last decision.

        Raises:
            RuntimeError: nothing is decided yet.
        """
        if self._last_step is None:
            raise RuntimeError("nothing is decided yet: call step")
        return self._last_step

    @property
    def length(self) -> int:
        """Number of routed tokens per window, P."""
        return self._walk.compute.shape[1]

    def contextual(self) -> Tensor:
        """(N,), the part of the last decision's rewards that depends on the routes of earlier tokens."""
        return checked_contextual(self.reward, self.last_step)

    def fork(self) -> RoutingDynamics:
        """A copy of the episode that goes on by itself; both share what is decided already."""
        other = copy.copy(self)
        other._walk, other._big = self._walk.fork(), self._big.clone()
        other._actions, other._rewards = list(self._actions), list(self._rewards)
        other._parts = {name: list(earned) for name, earned in self._parts.items()}
        return other

    @property
    def rewards(self) -> Tensor:
        """(l, N), what the l decisions so far have earned."""
        return torch.stack(self._rewards)

    @property
    def outcome(self) -> Outcome:
        """The outcome of the finished episode."""
        last, rewards = self.last_step, self.rewards.detach()
        assert last.loss is not None
        return Outcome(
            loss=last.loss.detach(),
            gain=last.gain.detach(),
            compute=self.compute.detach(),
            rewards=rewards,
            credits=rewards,
            routes=torch.stack(self._actions, dim=1),
            parts={name: torch.stack(earned).detach() for name, earned in self._parts.items()},
        )


def _lens(walk: RoutedPass, stream: Tensor) -> Tensor:
    return walk.losses(stream).flatten()
