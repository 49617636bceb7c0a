"""Example of a router: it uses the big network in the first layers for some tokens.

These are the tokens with a spread-out hidden state: its largest number is small compared with its length. The class is
one file outside of the package. You can use it wherever you can use a trained router:

    python -c "from examples.early_layers import EarlyLayers; EarlyLayers(layers=4).save_pretrained('runs/early')"
    duorl evaluate --router runs/early
"""

from __future__ import annotations

import torch
from torch import Tensor

from duorl.costs import BIG, SMALL
from duorl.routers import Router


class EarlyLayers(Router):
    """Big in the first layers for tokens with a spread-out hidden state, small elsewhere.

    Args:
        layers: number of layers that may be big.
        threshold: a state is spread out if its largest number divided by its length is below this.
    """

    def __init__(self, layers: int = 4, threshold: float = 0.5):
        super().__init__(layers=layers, threshold=threshold)  # a saved router is made again from these
        if layers < 0:
            raise ValueError(f"layers must be at least 0, not {layers}")

    def forward(self, hidden: Tensor, layer: int, compute: Tensor) -> Tensor:
        """Shape (...), action codes; see `Router.forward`."""
        peak = hidden.abs().amax(-1) / hidden.norm(dim=-1)
        spread_out = (peak < self.config["threshold"]) & (layer < self.config["layers"])
        return torch.where(spread_out, BIG, SMALL)
