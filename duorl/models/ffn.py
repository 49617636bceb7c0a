"""DuoFFN: the big and the small feed-forward network of one layer (Duo-LLM, section "Model")."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from duorl.costs import BIG, SKIP, SMALL, linear_flops
from duorl.models.calls import current

_CACHED = 2**20  # inner activations that fit into a processor's cache
_FEW = 16  # tokens: one more operation of torch takes longer than they do in Python
_WAIT = 25 * 10**10  # FLOPs that a GPU does while the host waits for the groups' sizes (`benchmarks/groups.py`)


def group_sizes(codes: Tensor) -> Tensor:
    """Number of tokens that each action has: (..., N) to (..., 3)."""
    return torch.stack([(codes == action).sum(-1) for action in (SKIP, SMALL, BIG)], dim=-1)


def _sizes(codes: Tensor) -> list[int]:
    """The same of (N,) for the host, which waits for it; a few tokens are counted there."""
    if len(codes) > _FEW:
        return group_sizes(codes).tolist()
    few = codes.tolist()
    return [few.count(action) for action in (SKIP, SMALL, BIG)]


class DuoFFN(nn.Module):
    """Replaces the `mlp` of a decoder layer: for each token, it runs the big network, the small one, or none.

    When its layer calls it, the current call decides (`duorl.models.calls`). Without a call, big runs everywhere.
    """

    def __init__(self, big: nn.Module, small: nn.Module):
        super().__init__()
        self.big = big
        self.small = small

    def forward(self, hidden: Tensor, *, actions: Tensor | int | None = None, sizes: list[int] | None = None) -> Tensor:
        """Shape (..., d) to (..., d).

        Args:
            hidden: (..., d).
            actions: codes 0 skip, 1 small, 2 big: (...), one per token, or one for all; None: the call decides.
            sizes: see `route`.
        """
        if isinstance(actions, Tensor):
            return self.route(hidden, actions, sizes)
        if actions is not None:
            return self.run(hidden, actions)
        call = current()
        return self.big(hidden) if call is None else call.ffn(self, hidden)

    def run(self, hidden: Tensor, action: int) -> Tensor:
        """Apply one action to all tokens: (..., d) to (..., d)."""
        if action == SKIP:
            return torch.zeros_like(hidden)
        return _in_cache(self.big if action == BIG else self.small, hidden)

    def route(self, hidden: Tensor, actions: Tensor, sizes: list[int] | None = None) -> Tensor:
        """Apply the action of each token: tokens are sorted by action, and each network runs on its group only.

        Args:
            hidden: (..., d).
            actions: (...), codes 0 skip, 1 small, 2 big.
            sizes: number of tokens of each action, if the host knows it.

        Returns:
            Shape (..., d); zeros for skip.
        """
        if actions.numel() == 1 and actions.device.type == "cpu" and (only := int(actions)) in (SKIP, SMALL, BIG):
            return self.run(hidden, only)
        tokens, codes = hidden.flatten(0, -2), actions.flatten()  # (N, d), (N,)
        if sizes is None:
            if self.cheaper_than_waiting(tokens):
                return self._select(hidden, actions)
            sizes = _sizes(codes)
        if max(sizes) == len(tokens):
            return self.run(hidden, sizes.index(len(tokens)))
        # index_select copies rows in both directions: on a CPU, this is several times faster than indexing.
        order = codes.argsort()
        groups = tokens.index_select(0, order).split(sizes)
        outputs = torch.cat([self.run(group, action) for action, group in enumerate(groups) if len(group)])
        return outputs.index_select(0, order.argsort()).view_as(hidden)

    def cheaper_than_waiting(self, tokens: Tensor) -> bool:
        """Whether an accelerator runs the networks on all tokens (N, d) sooner than the host learns a group's size.

        On a processor, groups are never much slower, also those of single tokens (`benchmarks/groups.py`). The number
        of tokens decides, not a measurement: both ways round differently, and the same seed gives the same result.
        """
        if tokens.device.type == "cpu":
            return False
        return linear_flops(self) * len(tokens) < _WAIT

    def _select(self, hidden: Tensor, actions: Tensor) -> Tensor:
        """Run both networks on all tokens, and take what each token chose: no host synchronisation."""
        output = self.run(hidden, SKIP)
        for action in (SMALL, BIG):
            output = torch.where((actions == action)[..., None], self.run(hidden, action), output)
        return output


class AddingDuoFFN(DuoFFN):
    """For layers that leave the sum to their network, as Bloom's do: they call it with the residual stream."""

    def forward(self, hidden: Tensor, residual: Tensor | None = None, **choice: Any) -> Tensor:
        """Shape (..., d) to (..., d); the residual stream (..., d) is added if it is given."""
        output = super().forward(hidden, **choice)
        return output if residual is None else residual + output


def _in_cache(ffn: nn.Module, hidden: Tensor) -> Tensor:
    """Output of a network. On a CPU in float32, it is computed in parts that fit into the cache: up to a third faster.

    In lower precisions, a product prepares its weights anew for each part, so parts are slower; and quantized networks
    round the parts of a batch in their own way.
    """
    if hidden.device.type != "cpu" or hidden.dtype != torch.float32:
        return ffn(hidden)
    tokens, widest = hidden.flatten(0, -2), max((max(weight.shape) for weight in ffn.parameters()), default=0)
    if len(tokens) <= _FEW or not widest:
        return ffn(hidden)
    rows = max(_FEW, _CACHED // widest)
    if len(tokens) <= rows:
        return ffn(hidden)
    return torch.cat([ffn(part) for part in tokens.split(rows)]).view_as(hidden)
