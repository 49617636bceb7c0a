"""BudgetRouter: a router with exactly k big layers per token."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from duorl.costs import BIG
from duorl.inputs import View
from duorl.routers.base import LogitRouter
from duorl.routers.wrapped import WrappedRouter


class BudgetRouter(WrappedRouter):
    """Takes the most probable action of a router among those that still allow exactly k big layers.

    Args:
        router: a router with a logit for big and for another action; or, when it is loaded from a file, its class's
            name and `config`.
        big_layers: number of big layers, k.

    Raises:
        ValueError: k is not in 0 to L, or the router has no logits, no option `layers`, or not big and another action.
    """

    def __init__(self, router: LogitRouter | dict[str, Any], big_layers: int):
        super().__init__(router, big_layers=big_layers)
        layers = self.router.sizes()[0]
        if layers is None:
            raise ValueError(f"a budget needs a router with an option `layers`, not {type(self.router).__name__}")
        if not 0 <= big_layers <= layers:
            raise ValueError(f"big_layers must be in 0 to {layers}, not {big_layers}")
        if BIG not in self.codes or len(self.codes) < 2:
            raise ValueError("a budget of big layers needs a router that can take big and another action")
        self.layers, self.big_layers = layers, big_layers

    def at(self, *, price: float) -> BudgetRouter:
        """The same budget for the router at a price; see `Router.at`."""
        return BudgetRouter(cast(LogitRouter, self.router.at(price=price)), self.big_layers)

    def logits(self, view: View) -> Tensor:
        """The logits of the router, -inf for actions that the budget forbids: (..., A).

        Raises:
            ValueError: the view does not have the actions of the layers before.
        """
        if len(view.taken) != view.layer:
            raise ValueError("a budget needs the earlier actions: call decide with the view of a pass (walk.view)")
        big = torch.zeros_like(view.compute, dtype=torch.int64)
        for actions in view.taken:
            big = big + (actions == BIG)
        missing = (self.big_layers - big)[..., None]
        left = self.layers - view.layer
        ruled_out = (missing == 0) & (self.codes == BIG) | (missing == left) & (self.codes != BIG)
        return self.router.logits(view).masked_fill(ruled_out, -torch.inf)
