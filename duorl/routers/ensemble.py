"""The ensemble: several head routers with the same inputs; the mean of their logits decides.

After MEMTL (2023): shared inputs, heads trained on bootstrap samples, and their spread as uncertainty. The evaluation
in MEMTL's code chooses a head per sample with the help of the labels. That is an upper bound, not a router, so it is
not here.

    router.spread(walk.view)                                # (B, T), difference between members
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from duorl.checks import require_positive
from duorl.costs import BIG, SMALL, action_ids
from duorl.inputs import View
from duorl.routers.base import LogitRouter
from duorl.routers.heads import HeadRouter


class EnsembleRouter(LogitRouter):
    """K head routers with the same inputs. In deployment it takes the action with the highest mean logit.

    Args:
        layers: L.
        hidden_size: d.
        actions: names of the actions it chooses from, A of them.
        width: hidden units of a head; 0 for a linear map.
        seed: seed of the first member's initial weights; the other members use the next numbers.
        prices: lowest and highest price it is trained for, as for `HeadRouter`.
        price: the price it is deployed at; see `at`.
        members: number of members, K.
        inputs: names of the heads' further inputs, see `duorl.inputs`.
    """

    def __init__(
        self,
        layers: int,
        hidden_size: int,
        actions: Sequence[str] = ("small", "big"),
        width: int = 0,
        seed: int = 0,
        prices: Sequence[float] | None = None,
        price: float | None = None,
        members: int = 5,
        inputs: Sequence[str] = (),
    ):
        super().__init__(
            layers=layers,
            hidden_size=hidden_size,
            actions=list(actions),
            width=width,
            seed=seed,
            prices=None if prices is None else list(prices),
            price=price,
            members=members,
            inputs=list(inputs),
        )
        require_positive(members=members)
        self.register_buffer("codes", action_ids(actions), persistent=False)
        self._members = nn.ModuleList(
            HeadRouter(layers, hidden_size, actions, width, seed + member, prices, inputs=inputs)
            for member in range(members)
        )

    @property
    def members(self) -> list[HeadRouter]:
        """The K members."""
        return list(cast(Iterable[HeadRouter], self._members))

    def flops(self) -> float:
        """The sum of the members'; see `Router.flops`."""
        return sum(member.flops() for member in self.members)

    def every_logits(self, view: View) -> Tensor:
        """Every member's logits: (K, ..., A)."""
        view = self.priced(view)
        return torch.stack([member.logits(view) for member in self.members])

    def spread(self, view: View) -> Tensor:
        """Uncertainty: the standard deviation over members of the logit of big minus that of small.

        Returns:
            Shape (...), in the unit of the logits: nats if the members learned values.

        Raises:
            ValueError: small and big are not both among the actions.
        """
        known = self.codes.tolist()
        if not {SMALL, BIG} <= set(known):
            raise ValueError(f"spread needs the actions small and big, not {', '.join(self.config['actions'])}")
        logits = self.every_logits(view)
        return (logits[..., known.index(BIG)] - logits[..., known.index(SMALL)]).std(0, correction=0)

    def logits(self, view: View) -> Tensor:
        """The members' mean, (..., A); see `LogitRouter.logits`."""
        return self.every_logits(view).mean(0)
