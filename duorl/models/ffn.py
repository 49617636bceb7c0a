"""DuoFFN: the big and the small feed-forward network of one layer (Duo-LLM, section "Model")."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from duorl.costs import BIG, SKIP

Decision = Callable[[Tensor], Tensor]
_CACHED = 2**20  # inner activations that a processor's cache holds


class DuoFFN(nn.Module):
    """A drop-in replacement for a decoder layer's `mlp`: per token it runs the big network, the small one, or none.

    Called by its layer it runs big for every token, unless `decide` is set to a function from its input
    (B, T, d) to actions (B, T). While `muted` it returns zeros and keeps its input in `heard`, so that the
    layer's output is the residual stream after attention.
    """

    def __init__(self, big: nn.Module, small: nn.Module):
        super().__init__()
        self.big = big
        self.small = small
        self.decide: Decision | None = None
        self.muted = False
        self.heard: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """Shape (B, T, d) to (B, T, d)."""
        if self.muted:
            self.heard = hidden
            return torch.zeros_like(hidden)
        if self.decide is None:
            return self.big(hidden)
        return self.route(hidden, self.decide(hidden))

    def run(self, hidden: Tensor, action: int) -> Tensor:
        """One action for all tokens: (..., d) to (..., d)."""
        if action == SKIP:
            return torch.zeros_like(hidden)
        return _in_cache(self.big if action == BIG else self.small, hidden)

    def route(self, hidden: Tensor, actions: Tensor) -> Tensor:
        """Each token's own action: tokens are sorted by action, and each network sees only its group.

        Args:
            hidden: (..., d).
            actions: (...), codes 0 skip, 1 small, 2 big.

        Returns:
            Shape (..., d); zeros where skipped.
        """
        tokens = hidden.flatten(0, -2)  # (N, d)
        order = actions.flatten().argsort()
        counts = actions.flatten().bincount(minlength=3).tolist()  # the group sizes: the one host synchronisation
        if max(counts) == len(tokens):
            return self.run(hidden, counts.index(len(tokens)))
        groups = tokens[order].split(counts)
        outputs = torch.cat([self.run(group, action) for action, group in enumerate(groups) if len(group)])
        return torch.empty_like(outputs).index_copy(0, order, outputs).view_as(hidden)


def _in_cache(ffn: nn.Module, hidden: Tensor) -> Tensor:
    """A network's output, on a processor in parts whose inner activations stay in its cache: up to a third faster."""
    rows = _CACHED // max(max(weight.shape) for weight in ffn.parameters())
    tokens = hidden.flatten(0, -2)
    if hidden.device.type != "cpu" or len(tokens) <= rows:
        return ffn(hidden)
    return torch.cat([ffn(part) for part in tokens.split(rows)]).view_as(hidden)
