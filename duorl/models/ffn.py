"""DuoFFN: the big and the small feed-forward network of one layer (Duo-LLM, section "Model")."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from duorl.costs import BIG, SKIP
from duorl.models.calls import current

_CACHED = 2**20  # inner activations that a processor's cache holds


class DuoFFN(nn.Module):
    """A drop-in replacement for a decoder layer's `mlp`: per token it runs the big network, the small one, or none.

    Called by its layer it does what the call it is in says (`duorl.models.calls`), and without one runs big for every
    token.
    """

    def __init__(self, big: nn.Module, small: nn.Module):
        super().__init__()
        self.big = big
        self.small = small

    def forward(self, hidden: Tensor, *, actions: Tensor | int | None = None) -> Tensor:
        """Shape (..., d) to (..., d).

        Args:
            hidden: (..., d).
            actions: codes 0 skip, 1 small, 2 big: (...), each token's own, or one for all; None: as the call says.
        """
        if isinstance(actions, Tensor):
            return self.route(hidden, actions)
        if actions is not None:
            return self.run(hidden, actions)
        call = current()
        return self.big(hidden) if call is None else call.ffn(self, hidden)

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
        # Rows are copied by index_select both ways: on a processor several times faster than indexing or index_copy.
        groups = tokens.index_select(0, order).split(counts)
        outputs = torch.cat([self.run(group, action) for action, group in enumerate(groups) if len(group)])
        return outputs.index_select(0, order.argsort()).view_as(hidden)


def _in_cache(ffn: nn.Module, hidden: Tensor) -> Tensor:
    """A network's output, on a processor in parts whose inner activations stay in its cache: up to a third faster."""
    rows = _CACHED // max(max(weight.shape) for weight in ffn.parameters())
    tokens = hidden.flatten(0, -2)
    if hidden.device.type != "cpu" or len(tokens) <= rows:
        return ffn(hidden)
    return torch.cat([ffn(part) for part in tokens.split(rows)]).view_as(hidden)
