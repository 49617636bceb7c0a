"""The environment of the agents: the dynamics over the windows of a text, episode after episode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from duorl import ranks
from duorl.costs import ACTIONS
from duorl.envs.dynamics import RoutingDynamics
from duorl.envs.later import mean_effects
from duorl.envs.order import WindowOrder
from duorl.models.footprint import Keeps, require_room
from duorl.models.loading import check_windows
from duorl.prices import draw_prices
from duorl.rewards import Step
from duorl.routed_pass import RoutedPass

if TYPE_CHECKING:
    from duorl.models import DuoForCausalLM

_PROBED = 24  # windows, for the effects on later tokens


class Lockstep(RoutingDynamics):
    """The environment of the agents: whole windows of a text in lockstep, N = K * B * T tokens per episode.

    Args:
        model: a frozen duo model.
        windows: (W, T+1), text for the training of routers.
        windows_per_batch: number of windows per episode, B; with several ranks (`duorl.ranks`), of each.
        seed: seed of the order of the windows and of their prices; agents use it too.
        later_effects: an action is also credited with what it gains later tokens, in the mean of its layer. This is
            measured before the first episode, by changing some tokens of random routes, see `duorl.envs.later`. It has
            far less noise than `token_discount`. `ReinMax` does not need it.
        options: as for `RoutingDynamics`. If prices vary, the price of each window is drawn anew in every episode,
            uniformly on a log scale; its copies have the same price.
    """

    def __init__(
        self,
        model: DuoForCausalLM,
        windows: Tensor,
        *,
        windows_per_batch: int = 4,
        seed: int = 0,
        later_effects: bool = False,
        **options: Any,
    ):
        super().__init__(model, **options)
        if later_effects and self.context == "reference":
            raise ValueError("later_effects: in the reference context a token does not change what later ones read")
        self.later_effects = later_effects
        self._later = torch.full((self.layers, len(ACTIONS)), torch.nan, device=model.device)
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
        require_room(self.model, self.num_tokens, keeps, fix)

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
        if self.later_effects and self._later.isnan().any():
            picked = torch.randperm(len(self.windows), generator=torch.Generator().manual_seed(self.first_seed))
            self._later = mean_effects(self.model, self.windows[picked[:_PROBED]], self.codes, seed=self.first_seed)
        self._before_draw = self._place()
        drawn = torch.from_numpy(next(self._order))
        price = self.prices and ranks.own(draw_prices(self.prices, len(drawn), self._draws))
        index = ranks.own(drawn)
        self.reset(self.windows[index], price=price, reference_loss=self.reference_losses(index))

    def _credit_for_later_tokens(self, step: Step) -> Tensor:
        credit = super()._credit_for_later_tokens(step)
        return credit + self._later[step.layer, step.action] if self.later_effects else credit

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
        return {**place, "charged": self._charged, "reference_losses": self._known_losses, "later": self._later}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Load a state: the next episode is the one that followed it."""
        self._order.restore(state["order"])
        self._draws.set_state(state["draws"])
        if state["charged"] != self._charged:
            self.charge(state["charged"])
        self._known_losses = state["reference_losses"].clone()
        self._later = state["later"].to(self._later)  # beside the actions, wherever the checkpoint was read
        self.layer = self.layers
