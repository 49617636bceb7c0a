"""A router of one's own: the big network in the first layers of every token that is far from decided.

A token counts as far from decided where its hidden state is spread out: where its largest number is small beside its
length. The class is one file outside of the package, and goes wherever a trained router goes:

    python -c "from examples.early_layers import EarlyLayers; EarlyLayers(layers=4).save_pretrained('runs/early')"
    duorl evaluate --router runs/early
"""

from __future__ import annotations

import torch
from torch import Tensor

from duorl.costs import BIG, SMALL
from duorl.routers import Router


class EarlyLayers(Router):
    """Big in the first layers for tokens whose state is spread out, small elsewhere.

    Args:
        layers: how many layers may be big.
        threshold: of the largest number's share of the state's length, below which a state is spread out.
    """

    def __init__(self, layers: int = 4, threshold: float = 0.5):
        super().__init__(layers=layers, threshold=threshold)  # a saved router is rebuilt from these
        if layers < 0:
            raise ValueError(f"layers must be at least 0, not {layers}")

    def forward(self, hidden: Tensor, layer: int, compute: Tensor) -> Tensor:
        """Shape (...), action codes; see `Router.forward`."""
        peak = hidden.abs().amax(-1) / hidden.norm(dim=-1)
        spread_out = (peak < self.config["threshold"]) & (layer < self.config["layers"])
        return torch.where(spread_out, BIG, SMALL)
