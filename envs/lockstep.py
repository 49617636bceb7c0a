"""The environment of the agents: the dynamics over the windows of a text, episode after episode."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from duorl import ranks
from duorl.costs import ACTIONS
from duorl.envs.credit import Credit
from duorl.envs.dynamics import RoutingDynamics
from duorl.envs.order import WindowOrder
from duorl.envs.outcome import Outcome
from duorl.models.footprint import Batch, Keeps, require_room
from duorl.models.loading import check_windows
from duorl.prices import draw_prices
from duorl.routed_pass import RoutedPass

if TYPE_CHECKING:
    from duorl.models import DuoForCausalLM


class Lockstep(RoutingDynamics):
    """The environment of the agents: whole windows of a text in lockstep, N = K * B * T tokens per episode.

    Args:
        model: a frozen duo model.
        windows: (W, T+1), text for the training of routers.
        windows_per_batch: number of windows per episode, B; with several ranks (`duorl.ranks`), of each.
        seed: seed of the order of the windows and of their prices; agents use it too.
        token_discount, later_effects: what agents are also credited with for later tokens, see `duorl.envs.credit`.
            `ReinMax` does not need the second one.
        options: as for `RoutingDynamics`. If prices vary, the price of each window is drawn anew in every episode,
            uniformly on a log scale; its copies have the same price.

    Attributes:
        credit: adds to the rewards what later tokens gain.
    """

    def __init__(
        self,
        model: DuoForCausalLM,
        windows: Tensor,
        *,
        windows_per_batch: int = 4,
        seed: int = 0,
        token_discount: float = 0.0,
        later_effects: bool = False,
        **options: Any,
    ):
        super().__init__(model, **options)
        if later_effects and self.context == "reference":
            raise ValueError("later_effects: in the reference context a token does not change what later ones read")
        self.credit = Credit(self.reward, token_discount=token_discount, later_effects=later_effects)
        check_windows(model, windows)
        self.windows = windows.to(model.device)
        self.windows_per_batch = windows_per_batch
        self.first_seed = seed
        self._known_losses = torch.full((len(windows), windows.shape[1] - 1), torch.nan)
        self.seed(seed)
        self.require_room()

    def require_room(self, keeps: Keeps = "states") -> None:
        """Refuse more tokens at once than fit into memory.

        Args:
            keeps: what the learner keeps of a pass, see `duorl.models.footprint`.

        Raises:
            ValueError: says how much is needed and how much is free.
        """
        fix = f"lower group_size ({self.group_size}) or windows_per_batch ({self.windows_per_batch})"
        windows, length = self.group_size * self.windows_per_batch, self.windows.shape[1] - 1
        require_room(self.model, Batch(windows, length, keeps, self.context), fix)

    def seed(self, seed: int) -> None:
        """Start the order of the windows again, with a seed."""
        batch = ranks.count() * self.windows_per_batch
        self._order = WindowOrder(len(self.windows), batch, np.random.default_rng(seed))
        self._draws = torch.Generator().manual_seed(seed)
        self._before_draw = self._place()

    @property
    def num_tokens(self) -> int:
        """Number of tokens per episode, N."""
        return self.group_size * self.windows_per_batch * (self.windows.shape[1] - 1)

    def draw(self) -> None:
        """Begin an episode with the next windows."""
        if self.credit.unmeasured:
            self.credit.prepare(self._plain(), self.windows, self.first_seed)
        self._before_draw = self._place()
        drawn = torch.from_numpy(next(self._order))
        price = self.prices and ranks.own(draw_prices(self.prices, len(drawn), self._draws))
        index = ranks.own(drawn)
        self.reset(self.windows[index], price=price, reference_loss=self.reference_losses(index))

    def _plain(self) -> RoutingDynamics:
        """The same task for windows one by one, without credit and without the place in the text."""
        return RoutingDynamics(
            self.model,
            reward=copy.deepcopy(self.reward),
            actions=self.actions,
            context=self.context,
            reference=ACTIONS[self.reference],
            prices=self.prices,
        )

    def reset(self, *args: Any, **kwargs: Any) -> None:
        """Begin an episode; see `RoutingDynamics.reset`."""
        super().reset(*args, **kwargs)
        self._credits: list[Tensor] = []

    def step(self, choice: Tensor, weights: Tensor | None = None) -> Tensor:
        """Decide one layer; (N,) rewards with the credit for later tokens. See `RoutingDynamics.step`."""
        credits = super().step(choice, weights)
        if self.credit.given:
            with torch.set_grad_enabled(weights is not None):
                credits = credits + self.credit(self)
            self._credits.append(credits)
        return credits

    @property
    def outcome(self) -> Outcome:
        """The outcome of the finished episode, with the credits."""
        found = super().outcome
        return replace(found, credits=torch.stack(self._credits).detach()) if self._credits else found

    @torch.no_grad()
    def reference_losses(self, index: Tensor) -> Tensor:
        """Losses of windows (B,) along the reference route, (B, T) nats; computed once for each window."""
        known = self._known_losses[index]
        if known.isnan().any():
            walk = RoutedPass(self.model, self.windows[index], context=self.context).take_all(self.reference)
            known = self._known_losses[index] = walk.losses().float().cpu()
        return known.to(self.windows.device)

    def _place(self) -> dict[str, Any]:
        return {"order": self._order.state(), "draws": self._draws.get_state()}

    def state(self) -> dict[str, Any]:
        """The place in the text and the price. An episode that is drawn but not begun is drawn again later."""
        drawn = not self.done and self.layer == 0
        place = self._before_draw if drawn else self._place()
        later = self.credit.state(self.layers)
        return {**place, "charged": self._charged, "reference_losses": self._known_losses, "later": later}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Load a state: the next episode is the one that followed it."""
        self._order.restore(state["order"])
        self._draws.set_state(state["draws"])
        if state["charged"] != self._charged:
            self.charge(state["charged"])
        self._known_losses = state["reference_losses"].clone()
        self.credit.restore(state["later"])
        self.layer = self.layers
