"""BudgetRouter: a router held to exactly k big layers per token."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from duorl.costs import BIG
from duorl.inputs import View
from duorl.routers import base
from duorl.routers.base import LogitRouter


class BudgetRouter(LogitRouter):
    """Takes the router's likeliest action among those from which exactly k big layers can still be met.

    Args:
        router: with a logit for big and for something else; or, of one that is rebuilt from a file, its class's name
            and `config`.
        big_layers: k.

    Raises:
        ValueError: k is not in 0 to L, or the router cannot take big, or nothing else, or has no number of layers.
    """

    def __init__(self, router: LogitRouter | dict[str, Any], big_layers: int):
        inner = base.rebuilt(router) if isinstance(router, dict) else router
        if not isinstance(inner, LogitRouter) or "layers" not in inner.config:
            raise ValueError(f"a budget needs a LogitRouter with an option `layers`, not {type(inner).__name__}")
        super().__init__(router=base.described(inner), big_layers=big_layers)
        self.layers = inner.config["layers"]
        if not 0 <= big_layers <= self.layers:
            raise ValueError(f"big_layers must be in 0 to {self.layers}, not {big_layers}")
        if BIG not in inner.codes or len(inner.codes) < 2:
            raise ValueError("a budget of big layers needs a router that can take big, and something else")
        self.router, self.big_layers = inner, big_layers

    @property
    def trained_for(self) -> dict[str, Any] | None:  # type: ignore[override]
        """What the router's is."""
        return self.router.trained_for

    @trained_for.setter
    def trained_for(self, record: dict[str, Any] | None) -> None:
        self.router.trained_for = record

    def sizes(self) -> tuple[int | None, int | None]:
        """The router's."""
        return self.router.sizes()

    @property
    def takes_price(self) -> bool:
        """The router does."""
        return self.router.takes_price

    def at(self, *, price: float) -> BudgetRouter:
        """The same budget on the router at a price; see `Router.at`."""
        return BudgetRouter(cast(LogitRouter, self.router.at(price=price)), self.big_layers)

    @property
    def codes(self) -> Tensor:  # type: ignore[override]
        """(A,) int64, the router's."""
        return self.router.codes

    def logits(self, view: View) -> Tensor:
        """The router's, -inf where the budget rules an action out: (..., A).

        Raises:
            ValueError: the view does not know what the layers before took.
        """
        if len(view.taken) != view.layer:
            raise ValueError("a budget counts the big layers so far: decide on a pass's view, walk.view")
        big = torch.zeros_like(view.compute, dtype=torch.int64)
        for actions in view.taken:
            big = big + (actions == BIG)
        missing = (self.big_layers - big)[..., None]
        left = self.layers - view.layer
        ruled_out = (missing == 0) & (self.codes == BIG) | (missing == left) & (self.codes != BIG)
        return self.router.logits(view).masked_fill(ruled_out, -torch.inf)
