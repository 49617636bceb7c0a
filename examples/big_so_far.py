"""Example of a router input: the share of big layers of a token among the layers before.

An input is a function of a view. Its import path is named in a list. The router reads it in training and in deployment:

    python train.py --env.inputs '["update_norm", "examples.big_so_far.big_so_far"]'
"""

from __future__ import annotations

import torch
from torch import Tensor

from duorl.costs import BIG
from duorl.inputs import View


def big_so_far(view: View) -> Tensor:
    """Shape (..., 1), in [0, 1]; 0 in the first layer."""
    if not view.taken:
        return torch.zeros_like(view.compute)[..., None]
    big = torch.stack([actions == BIG for actions in view.taken], dim=-1)  # (..., layer)
    return big.to(view.compute.dtype).mean(-1, keepdim=True)
