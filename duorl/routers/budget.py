"""BudgetRouter: a router held to exactly k big layers per token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from duorl.costs import BIG
from duorl.routers.base import Router
from duorl.routers.heads import HeadRouter


class BudgetRouter(Router):
    """Takes the router's likeliest action among those from which exactly k big layers can still be met.

    Args:
        router: heads, with big among their actions, or the `config` of one that is rebuilt from a file.
        big_layers: k.

    Raises:
        ValueError: k is not in 0 to L, or the router cannot take big, or nothing else.
    """

    def __init__(self, router: HeadRouter | dict[str, Any], big_layers: int):
        heads = HeadRouter(**router) if isinstance(router, dict) else router
        super().__init__(router=heads.config, big_layers=big_layers)
        if not 0 <= big_layers <= heads.config["layers"]:
            raise ValueError(f"big_layers must be in 0 to {heads.config['layers']}, not {big_layers}")
        if BIG not in heads.codes or len(heads.codes) < 2:
            raise ValueError("a budget of big layers needs a router that can take big, and something else")
        self.router = heads
        self._big: Tensor | None = None

    def forward(self, hidden: Tensor, layer: int, compute: Tensor) -> Tensor:
        """(...), within the budget; see `Router.forward`."""
        codes, config = self.router.codes, self.config
        big = hidden.new_zeros(hidden.shape[:-1], dtype=torch.int64) if layer == 0 or self._big is None else self._big
        missing = (config["big_layers"] - big)[..., None]
        left = config["router"]["layers"] - layer
        ruled_out = (missing == 0) & (codes == BIG) | (missing == left) & (codes != BIG)
        scores = self.router.score(hidden, layer, compute).masked_fill(ruled_out, -torch.inf)
        actions = codes[scores.argmax(-1)]
        self._big = big + (actions == BIG)
        return actions
