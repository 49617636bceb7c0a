"""Credit: what a token's choices gain the tokens after it, which read its keys and values.

The environment pays a token what its reward says. It also knows the *contextual* part of each reward: what depends on
the routes of earlier tokens (`Reward.contextual`). A learner that follows returns alone does not see that its choices
change the contextual parts of later tokens, and not only its own. A `Credit` adds this to the rewards, in the reward's
own unit.

    credit = Credit(reward, token_discount=0.5)
    rewards = env.step(choice)
    credits = rewards + credit(env)                        # (N,), of the last decision
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from duorl.costs import ACTIONS
from duorl.envs.later import mean_effects
from duorl.rewards import Reward, is_contextual

if TYPE_CHECKING:
    from duorl.envs.dynamics import RoutingDynamics

_PROBED = 24  # windows, for the effects on later tokens


class Credit:
    """What is added to the rewards of a decision for its effect on later tokens.

    Args:
        reward: the reward; without a contextual part, nothing can be credited.
        token_discount: a token is credited with the contextual part of the rewards of the later tokens of its window,
            times this factor per token of distance. 0: not so.
        later_effects: an action is credited with what it gains later tokens, in the mean of its layer: `prepare`
            measures it before the first episode, by changing some tokens of random routes (`duorl.envs.later`). It has
            far less noise than `token_discount`.

    Attributes:
        table: (L, 3), the measured effects by action code, in the unit of the reward; None before they are measured.

    Raises:
        ValueError: the discount is not in [0, 1), or the reward has no contextual part to credit.
    """

    def __init__(self, reward: Reward, *, token_discount: float = 0.0, later_effects: bool = False):
        if not 0 <= token_discount < 1:
            raise ValueError(f"token_discount must be in [0, 1), not {token_discount}")
        self.token_discount, self.later_effects = token_discount, later_effects
        if self.given and not is_contextual(reward):
            option = "later_effects" if later_effects else "token_discount"
            raise ValueError(
                f"{option} credits a token with the contextual part of later rewards, and {reward.name} has none: "
                "give a Reward that defines contextual(step)"
            )
        self.table: Tensor | None = None

    @property
    def given(self) -> bool:
        """Whether anything is credited."""
        return bool(self.token_discount or self.later_effects)

    @property
    def unmeasured(self) -> bool:
        """Whether `prepare` must measure the effects on later tokens first."""
        return self.later_effects and self.table is None

    def prepare(self, env: RoutingDynamics, windows: Tensor, seed: int) -> None:
        """Measure the effects on later tokens, on some of the windows (W, T+1).

        Args:
            env: a plain environment with the reward and the actions; its own episodes are played.
            windows: router text.
            seed: draws windows, routes and the tokens that change.
        """
        picked = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
        self.table = mean_effects(env, windows[picked[:_PROBED]], seed=seed)

    def __call__(self, env: RoutingDynamics) -> Tensor:
        """(N,), the credit for the last decision; 0 in the reference context, where tokens do not read each other."""
        step = env.last_step
        credit = torch.zeros_like(step.compute)
        if self.token_discount and env.context == "routed":
            earned = env.contextual().view(-1, env.length)
            credit = credit + later_sum(earned, self.token_discount).flatten()
        if self.table is not None:
            credit = credit + self.table.to(credit)[step.layer, step.action]
        return credit

    def state(self, layers: int) -> Tensor:
        """The table for a checkpoint, (L, 3); nan where it is not measured yet."""
        return torch.full((layers, len(ACTIONS)), torch.nan) if self.table is None else self.table

    def restore(self, table: Tensor) -> None:
        """Load a table."""
        self.table = None if table.isnan().any() else table


def later_sum(values: Tensor, discount: float) -> Tensor:
    """sum over s > t of discount^(s - t) * values_s: (W, T) to (W, T)."""
    distance = torch.arange(values.shape[1], device=values.device)
    distance = distance[:, None] - distance  # (T, T), s - t for s down and t across
    weights = torch.where(distance > 0, discount ** distance.clamp(min=0), 0.0)
    return values @ weights
