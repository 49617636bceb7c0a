"""Stage `choose`: the small network is the part of the big one that contributes most, with a refitted last map.

A feed-forward network writes a sum of contributions of its inner neurons. Neuron j contributes a_j w_j, where a_j is
its activation and w_j its column of the last map. The small network takes over the neurons with the largest mean of
a_j^2 |w_j|^2 over the tokens. Then its last map is fitted by least squares: it writes what big writes, as well as these
neurons can. Both need no derivatives, and two all-big passes over the text.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from duorl.models.ffn import DuoFFN
from duorl.models.modeling import DuoForCausalLM
from duorl.smalls.recording import big_passes, token_weights

BATCH = 8
"""Windows per pass."""
_RIDGE = 1e-3  # of the mean square of the inner activations: neurons that rarely act get small weights


@torch.no_grad()
def choose(
    model: DuoForCausalLM, windows: Tensor, *, batch: int = BATCH, tell: Callable[[int], None] = lambda tokens: None
) -> None:
    """Set the small networks of a model, in place.

    Args:
        model: a duo model whose big networks are trained.
        windows: (W, T+1), text; some ten thousand tokens are enough.
        batch: windows per pass.
        tell: called with the number of tokens that one more pass has read.

    Raises:
        ValueError: a network has no single last map, or its outputs are not finite.
    """
    lasts = [last_map(ffn) for ffn in model.stack.ffns]
    typical: list[Tensor] = []
    scores = [torch.zeros(_inner_size(last), dtype=torch.float64, device=model.device) for last in lasts]
    for tokens in windows.to(model.device).split(batch):
        with _inner_activations(lasts) as inner:
            for layer, _, written in big_passes(model, tokens):
                if len(typical) == layer:
                    typical.append(written.float().norm(dim=-1).median())
                weights = token_weights(written, typical[layer])
                scores[layer] += (_taken(inner).float().square() * weights[:, None]).sum(0).double()
        tell(tokens[:, 1:].numel())
    kept = []
    for ffn, last, score in zip(model.stack.ffns, lasts, scores, strict=True):
        lengths = _weight(last).float().square().sum(1).double()  # |w_j|^2, (inner,)
        kept.append((score * lengths).topk(_inner_size(_named(ffn.small, last, ffn.big))).indices.sort().values)
        _take_neurons(ffn, kept[-1], len(score))
    _refit(model, windows, lasts, kept, typical, batch, tell)


def sum_bytes(model: DuoForCausalLM) -> int:
    """Bytes of the sums that the least squares of all layers are solved from, in float64."""
    size = model.config.small_size + 1  # a bias
    return 8 * model.num_layers * size * (size + model.hidden_size)


def last_map(ffn: DuoFFN) -> nn.Module:
    """The linear map of the big network that reads its inner activations.

    Raises:
        ValueError: there is none, or more than one.
    """
    smalls = dict(ffn.small.named_modules())
    found = [
        module
        for name, module in ffn.big.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and _inner_size(module) != _inner_size(smalls[name])
    ]
    if len(found) != 1:
        raise ValueError(f"{type(ffn.big).__name__} has {len(found)} linear maps of its inner activations, not one")
    return found[0]


def _weight(last: nn.Module) -> Tensor:
    """The weight of a linear map as (in, out)."""
    weight = last.get_parameter("weight")
    return weight if isinstance(last, Conv1D) else weight.T


def _inner_size(last: nn.Module) -> int:
    return len(_weight(last))


def _named(small: nn.Module, last: nn.Module, big: nn.Module) -> nn.Module:
    """The module of the small network that has the name of one of the big network."""
    return small.get_submodule(next(name for name, module in big.named_modules() if module is last))


def _take_neurons(ffn: DuoFFN, kept: Tensor, inner: int) -> None:
    """Copy the weights of the kept neurons, for any family.

    A weight has the inner size in the dimension in which the two networks differ, or a multiple of it: Phi-3 keeps two
    maps in one weight, one after the other.
    """
    bigs = dict(ffn.big.named_parameters())
    for name, small in ffn.small.named_parameters():
        taken: Tensor = bigs[name]
        for dim, (size, new) in enumerate(zip(taken.shape, small.shape, strict=True)):
            if size != new:
                blocks = torch.arange(0, size, inner, device=kept.device)
                taken = taken.index_select(dim, (blocks[:, None] + kept).flatten())
        small.copy_(taken)


@contextmanager
def _inner_activations(lasts: list[nn.Module]):
    """In this block, the inputs of these maps are collected, (..., inner)."""
    found: list[Tensor] = []
    hooks = [
        last.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].flatten(0, -2).detach()))
        for last in lasts
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _taken(found: list[Tensor]) -> Tensor:
    """What was collected since the last time, (N, inner): a network may run in parts."""
    inner = torch.cat(found)
    found.clear()
    return inner


def _refit(
    model: DuoForCausalLM,
    windows: Tensor,
    lasts: list[nn.Module],
    kept: list[Tensor],
    typical: list[Tensor],
    batch: int,
    tell: Callable[[int], None],
) -> None:
    """Fit the last maps of the small networks by weighted least squares."""
    grams: list[Tensor | float] = [0.0] * len(lasts)
    crosses: list[Tensor | float] = [0.0] * len(lasts)
    for tokens in windows.to(model.device).split(batch):
        with _inner_activations(lasts) as inner:
            for layer, _, written in big_passes(model, tokens):
                scale = token_weights(written, typical[layer]).sqrt()[:, None]
                read = _with_ones(_taken(inner)[:, kept[layer]].float(), lasts[layer]) * scale
                grams[layer] = grams[layer] + (read.T @ read).double()
                crosses[layer] = crosses[layer] + (read.T @ (written.float() * scale)).double()
        tell(tokens[:, 1:].numel())
    for ffn, last, gram, cross in zip(model.stack.ffns, lasts, grams, crosses, strict=True):
        assert isinstance(gram, Tensor)
        ridge = _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        fitted = torch.linalg.solve(gram + ridge, cross)
        small = _named(ffn.small, last, ffn.big)
        _weight(small).copy_(fitted[: _inner_size(small)])
        if (bias := getattr(small, "bias", None)) is not None:
            bias.copy_(fitted[-1])


def _with_ones(read: Tensor, last: nn.Module) -> Tensor:
    """With a column of ones if the map has a bias."""
    return read if getattr(last, "bias", None) is None else torch.cat([read, read.new_ones(len(read), 1)], dim=1)
