"""An input of one's own: how many layers of a token have been big so far, as a share of the layers before.

An input is a function of a view, named in a list. Every learner's router sees it, in training and when deployed:

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
