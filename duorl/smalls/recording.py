"""What the big networks of a model read and write on text, layer by layer, and how much each token counts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from duorl import ranks
from duorl.checks import BadInput
from duorl.costs import BIG
from duorl.models.modeling import DuoForCausalLM


def in_own_precision(model: DuoForCausalLM) -> torch.autocast:
    """In this block, small networks in float32 compute in the precision of their model."""
    return torch.autocast(model.device.type, dtype=model.dtype, enabled=model.dtype != torch.float32)


@torch.no_grad()
def big_passes(model: DuoForCausalLM, tokens: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """An all-big pass over windows (B, T+1), which stops after every network.

    Yields:
        The layer, and input and output of its big network, both (B * T, d).

    Raises:
        BadInput: an output is not finite.
    """
    stack = model.stack
    hidden, arguments = stack.embed(tokens[:, :-1])
    for layer, ffn in enumerate(stack.ffns):
        residual, read = stack.attend(layer, hidden, arguments[layer])
        written = ffn.run(read, BIG)
        if not written.isfinite().all():
            name = str(written.dtype).removeprefix("torch.")
            fix = "the weights or the text are at fault" if written.dtype == torch.float32 else "give --dtype float32"
            raise BadInput(
                f"layer {layer}: the big network gives numbers that are not finite on this text in {name}: {fix}"
            )
        yield layer, read.flatten(0, 1), written.flatten(0, 1)
        hidden = stack.complete(layer, residual, written)


def token_weights(written: Tensor, typical: Tensor | None = None) -> Tensor:
    """The weight of each token's squared error, (N,): 1 / |y|^2, for tokens below the median that of the median.

    In some layers nearly all of the variance is in one token with a massive activation. With these weights, the errors
    of all tokens are relative to their own size, and no token rules.

    Args:
        written: (N, d), outputs of a big network.
        typical: the median of their sizes, scalar; by default that of these tokens, of all ranks.
    """
    sizes = written.float().norm(dim=-1)
    typical = ranks.joined(sizes).median() if typical is None else typical
    return sizes.clamp(min=typical.clamp(min=torch.finfo(torch.float32).tiny)).square().reciprocal()
