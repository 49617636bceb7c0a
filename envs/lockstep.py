"""The dynamics of routing, written once over tensors; the Gymnasium and SB3 environments are skins over it.

All episodes have L steps, so any number of tokens go through the model in lockstep, one layer a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from duorl.costs import ACTIONS, BIG, SMALL, action_ids
from duorl.models.loading import require_frozen
from duorl.models.modeling import DuoForCausalLM
from duorl.rewards import LossImprovement, Reward, Step, with_price
from duorl.routed_pass import Context, RoutedPass, remember
from duorl.routers.heads import PRICE_FEATURES, check_prices, draw_prices, price_features, update_norm


@dataclass(frozen=True)
class Outcome:
    """What an episode of N tokens came to.

    Attributes:
        loss: (N,) nats.
        gain: (N,) nats, reference loss - loss.
        compute: (N,), in [0, 1].
        rewards: (L, N).
        credits: (L, N), the rewards that a learner is told: with what a token's route did for later tokens.
        routes: (N, L) int64, action codes.
    """

    loss: Tensor
    gain: Tensor
    compute: Tensor
    rewards: Tensor
    credits: Tensor
    routes: Tensor

    def metrics(self) -> dict[str, float]:
        """Means over tokens, and each action's share in each layer, by TensorBoard tag."""
        means = {
            "rollout/return": self.rewards.sum(0).mean().item(),
            "rollout/gain": self.gain.mean().item(),
            "rollout/compute": self.compute.mean().item(),
            "rollout/loss": self.loss.mean().item(),
        }
        for code, name in enumerate(ACTIONS):
            shares = (self.routes == code).float().mean(0).tolist()
            means |= {f"actions_{name}/layer_{layer}": share for layer, share in enumerate(shares)}
        return means


class RoutingDynamics:
    """Tokens in lockstep through a frozen duo model: `reset`, then L times `step`.

    Args:
        model: a frozen duo model.
        reward: what a decision earns; `LossImprovement()` unless given.
        actions: names of the allowed actions, A of them; a choice is an index into them, cheapest first.
        context: `routed` or `reference`, see `duorl.routed_pass`.
        group_size: K copies of every window, side by side as (K, B, P) in the token axis.
        reference: the action of the reference route, whose loss gains are measured against.
        token_discount: in the routed context a token's route also changes what later tokens read. The learner is
            credited with `reward.later`, their gains, times this per token of distance; 0: with its own reward alone.
        prices: lowest and highest price; every window of an episode then has its own, given to `reset`, which replaces
            the reward's and is an input of the learner. None: the reward's own.
        signals: learners also see how far the layer before moved a token's state, see `duorl.routers.heads`.
        big_layers: exactly so many layers of every route must be big, a hard budget: see `action_masks`.

    Raises:
        ValueError: the discount is not in [0, 1), a parameter of the model is trainable, an action is unknown, the
            reward has no price to vary, or the budget cannot be met.
    """

    def __init__(
        self,
        model: DuoForCausalLM,
        *,
        reward: Reward | None = None,
        actions: Sequence[str] = ("small", "big"),
        context: Context = "routed",
        group_size: int = 1,
        reference: str = "small",
        token_discount: float = 0.0,
        prices: Sequence[float] | None = None,
        signals: bool = False,
        big_layers: int | None = None,
    ):
        require_frozen(model)
        if not 0 <= token_discount < 1:
            raise ValueError(f"token_discount must be in [0, 1), not {token_discount}")
        self.token_discount = token_discount
        self.model = model
        self.reward = reward or LossImprovement()
        self.prices = None if prices is None else check_prices(prices)
        self.price: Tensor | None = None
        self.signals = signals
        self._set_price: Callable[[float | Tensor], None] | None = None
        if self.prices is not None:
            self.charge(self.prices[0])  # a reward without a price is found now
        self.codes = action_ids(actions).to(model.device)
        self.actions = tuple(ACTIONS[code] for code in self.codes.tolist())
        self.context: Context = context
        self.group_size = group_size
        self.reference = int(action_ids([reference]))
        self.layers = model.num_layers
        self.layer = self.layers
        self.big_layers = big_layers
        if big_layers is not None and not (0 <= big_layers <= self.layers and {SMALL, BIG} <= set(self.codes.tolist())):
            raise ValueError(
                f"big_layers must be in 0 to {self.layers} and needs the actions small and big, not {big_layers} of "
                f"{', '.join(self.actions)}"
            )

    @torch.no_grad()
    def reset(self, tokens: Tensor, positions: Tensor | None = None, price: Tensor | None = None) -> None:
        """Begin an episode.

        Args:
            tokens: (B, T+1) windows.
            positions: (B, P), the tokens to route, in the reference context; all T unless given.
            price: (B,), each window's price where they vary.
        """
        tokens = tokens.to(self.model.device)
        positions = None if positions is None else positions.to(self.model.device)
        memory = remember(self.model, tokens, positions) if self.context == "reference" else None
        self._begin = partial(RoutedPass, self.model, tokens, context=self.context, memory=memory)
        self._teacher: Tensor | None = None
        self._base = self._constant(self.reference)
        self.reference_loss = self._base.losses().repeat(self.group_size, 1).flatten()
        self._walk = self._begin(copies=self.group_size)
        if self.prices is not None:
            if price is None:
                raise ValueError("prices vary: give each window's to reset")
            self.price = (
                price.to(tokens.device)[:, None].expand_as(self._base.compute).repeat(self.group_size, 1).flatten()
            )
            self.charge(self.price)
        self._previous: Tensor | None = None
        self._big = torch.zeros_like(self.compute, dtype=torch.int64)
        self._steps: list[Step] = []
        self._rewards: list[Tensor] = []
        self._credits: list[Tensor] = []
        self.layer = 0

    def charge(self, price: float | Tensor) -> None:
        """Let an all-big pass cost this from now on, in this environment alone: a number, or (N,), one per token.

        Raises:
            ValueError: the reward has no price to change.
        """
        if self._set_price is None:
            self.reward, self._set_price = with_price(self.reward)
        self._set_price(price)

    @property
    def hidden(self) -> Tensor:
        """(N, d), what the next FFN would read; after the last layer, the final residual stream."""
        return self._walk.hidden.flatten(0, 1)

    @property
    def compute(self) -> Tensor:
        """(N,), spent so far, in [0, 1]."""
        return self._walk.compute.flatten()

    @property
    def conditions(self) -> Tensor | None:
        """(N, C), what a learner sees beside the hidden state and the compute; None where there is nothing."""
        parts = [] if self.prices is None or self.price is None else [price_features(self.price, self.prices)]
        parts += [update_norm(self.hidden, self._previous)] if self.signals else []
        return torch.cat(parts, dim=-1) if parts else None

    @property
    def num_conditions(self) -> int:
        """C, see `conditions`."""
        return PRICE_FEATURES * (self.prices is not None) + self.signals

    def action_masks(self) -> Tensor:
        """(N, A) bool: the choices from which the budget of big layers can still be met exactly; all without one.

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
        """All layers are decided."""
        return self.layer == self.layers

    def step(self, choice: Tensor, weights: Tensor | None = None) -> Tensor:
        """Decide one layer.

        Args:
            choice: (N,) int64, indexes `actions`.
            weights: (N, A), each action's share in a mixture through which rewards can be differentiated: the choice as
                zeros and ones, for instance. All networks then run. None: only the chosen ones run, without gradients.

        Returns:
            (N,) rewards, with later tokens' credit.
        """
        with torch.set_grad_enabled(weights is not None):
            return self._step(choice, weights)

    def _step(self, choice: Tensor, weights: Tensor | None) -> Tensor:
        if self.done:
            raise RuntimeError("the episode is over: call reset")
        walk, actions = self._walk, self.codes[choice]
        hidden, before = walk.residual.flatten(0, 1), self.compute
        self._previous = self.hidden
        self._big += actions == BIG
        if weights is None:
            walk.step(actions.view_as(walk.compute))
        else:
            walk.mix(weights.unflatten(0, walk.compute.shape), self.codes.tolist())
        self.layer += 1
        last = walk.done
        step = Step(
            layer=self.layer - 1,
            action=actions,
            compute=self.compute - before,
            hidden=hidden,
            next_hidden=walk.entered.flatten(0, 1),
            last=last,
            loss=walk.losses().flatten() if last else None,
            reference_loss=self.reference_loss if last else None,
            previous=self._steps[-1] if self._steps else None,
            lens=partial(_lens, walk, walk.entered),
            distance=self._teacher_gain if last else None,
        )
        self._steps.append(step)
        reward = self.reward(step)
        if not isinstance(reward, Tensor) or reward.shape != step.compute.shape:
            shape = tuple(getattr(reward, "shape", ()))
            raise ValueError(f"{type(self.reward).__name__} must return one reward per token, shape (N,), not {shape}")
        self._rewards.append(reward)
        self._credits.append(reward + self._credit_for_later(step))
        return self._credits[-1]

    def _constant(self, action: int) -> RoutedPass:
        """A finished pass in which all tokens take one action."""
        walk = self._begin()
        while not walk.done:
            walk.take(action)
        return walk

    def _teacher_gain(self) -> Tensor:
        """(N,) nats: see `Step.teacher_gain`."""
        if self._teacher is None:
            self._teacher = self._constant(BIG).logits().float().log_softmax(-1)
        distances = self._base.divergences(self._teacher).repeat(self.group_size, 1)
        return (distances - self._walk.divergences(self._teacher)).flatten()

    def _credit_for_later(self, step: Step) -> Tensor:
        """(N,): what later tokens owe to this one. In the reference context tokens do not read each other's routes."""
        if self.context == "reference" or not self.token_discount:
            return torch.zeros_like(step.compute)
        later = self.reward.later(step).view_as(self._walk.compute)
        return later_sum(later, self.token_discount).flatten()

    @property
    def outcome(self) -> Outcome:
        """The finished episode's."""
        last = self._steps[-1]
        assert last.loss is not None
        routes = torch.stack([step.action for step in self._steps], dim=1)
        rewards, credits = torch.stack(self._rewards), torch.stack(self._credits)
        parts = (last.loss, last.gain, self.compute, rewards, credits, routes)
        return Outcome(*(part.detach() for part in parts))


def later_sum(values: Tensor, discount: float) -> Tensor:
    """sum over s > t of discount^(s - t) * values_s: (W, T) to (W, T)."""
    distance = torch.arange(values.shape[1], device=values.device)
    distance = distance[:, None] - distance  # (T, T), s - t for s down and t across
    weights = torch.where(distance > 0, discount ** distance.clamp(min=0), 0.0)
    return values @ weights


def _lens(walk: RoutedPass, stream: Tensor) -> Tensor:
    return walk.losses(stream).flatten()


def window_order(count: int, batch: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Endless batches of window indices: a new permutation each time, less what does not fill a batch.

    Raises:
        ValueError: there are fewer windows than a batch takes.
    """
    if count < batch:
        raise ValueError(f"the text has {count} windows, a batch takes {batch}: lower windows_per_batch")
    return _shuffled_batches(count, batch, generator)


def _shuffled_batches(count: int, batch: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    while True:
        order = generator.permutation(count)
        for start in range(0, count - batch + 1, batch):
            yield order[start : start + batch]


class Lockstep(RoutingDynamics):
    """Whole windows of a text in lockstep: N = K * B * T tokens an episode. What agents learn in.

    Args:
        model: a frozen duo model.
        windows: (W, T+1) router-training text.
        windows_per_batch: B.
        seed: of the order of the windows and of their prices; agents start from it too.
        options: as for `RoutingDynamics`. Where prices vary, each window's is drawn anew in every episode, uniformly
            on a log scale; its copies share it.
    """

    def __init__(self, model: DuoForCausalLM, windows: Tensor, *, windows_per_batch: int = 4, seed: int = 0, **options):
        super().__init__(model, **options)
        self.windows = windows.to(model.device)
        self.windows_per_batch = windows_per_batch
        self.first_seed = seed
        self.seed(seed)

    def seed(self, seed: int) -> None:
        """Start the order of the windows anew."""
        self._order = window_order(len(self.windows), self.windows_per_batch, np.random.default_rng(seed))
        self._draws = torch.Generator().manual_seed(seed)

    @property
    def num_tokens(self) -> int:
        """N, tokens per episode."""
        return self.group_size * self.windows_per_batch * (self.windows.shape[1] - 1)

    def draw(self) -> None:
        """Begin an episode with the next windows."""
        windows = self.windows[torch.from_numpy(next(self._order))]
        self.reset(windows, price=self.prices and draw_prices(self.prices, len(windows), self._draws))
