"""What a choice gains its own token, and the tokens after it, which read its keys and values.

Tokens follow base routes. In one layer, some of them change their action. A token does not change what earlier ones
read, so the losses of the tokens that did not change differ by the effect on later tokens alone: no noise of other
choices is in it. Policy gradients from returns cannot see this effect of one token among those of all others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from duorl.routed_pass import RoutedPass

if TYPE_CHECKING:
    from duorl.models import DuoForCausalLM

_CHANGED = 0.25  # of the tokens that can change
_LEAST = 30  # changed tokens, for an estimate


@dataclass(frozen=True)
class Effect:
    """What another action in one layer gains, in nats per changed token.

    Attributes:
        share: share of the tokens that can change.
        own: gain of the token itself; nan if too few tokens can change.
        later: gain of all later tokens together; nan likewise.
        error: standard error of `later`, over windows.
    """

    share: float
    own: float
    later: float
    error: float


def mean_effects(model: DuoForCausalLM, windows: Tensor, codes: Tensor, *, seed: int = 0) -> Tensor:
    """What an action gains later tokens, in the mean of its layer, against the first action: (L, 3) nats, by code.

    Args:
        model: a duo model.
        windows: (W, T+1).
        codes: (A,), the allowed actions. The base routes are random ones of these.
        seed: draws the routes and the tokens that change.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(codes), (*windows[:, 1:].shape, model.num_layers), generator=generator)
    routes, first = codes[drawn.to(codes.device)], int(codes[0])
    table = torch.zeros(model.num_layers, 3)
    for code in codes[1:].tolist():
        found = effects(model, windows, routes, chosen=first, instead=code, seed=seed)
        table[:, code] = torch.tensor([effect.later for effect in found]).nan_to_num()
    return table.to(codes.device)


@torch.no_grad()
def effects(
    model: DuoForCausalLM,
    windows: Tensor,
    routes: Tensor,
    *,
    chosen: int,
    instead: int,
    share: float = _CHANGED,
    seed: int = 0,
    batch: int = 8,
) -> list[Effect]:
    """Per layer, the gain of an action in place of the one that base routes have chosen. One pass per layer.

    Args:
        model: a duo model.
        windows: (W, T+1).
        routes: (W, T, L), base routes, action codes.
        chosen: the action of the tokens that can change.
        instead: their other action.
        share: share of these tokens that changes.
        seed: draws them.
        batch: windows per pass.
    """
    can = routes == chosen
    changed = can & (torch.rand(routes.shape, generator=torch.Generator().manual_seed(seed)) < share).to(can.device)
    parts = zip(windows.split(batch), routes.split(batch), changed.split(batch), strict=True)
    gains = torch.cat([_gains(model, *part, instead) for part in parts], dim=1)
    return [_effect(*layer) for layer in zip(gains, can.unbind(-1), changed.unbind(-1), strict=True)]


def _gains(model: DuoForCausalLM, tokens: Tensor, routes: Tensor, changed: Tensor, instead: int) -> Tensor:
    """By how much each layer's changes lower the losses, (L, B, T) nats. The layers before are shared."""
    walk, branches = RoutedPass(model, tokens), []
    while not walk.done:
        actions = routes[..., walk.layer]
        branch = walk.fork()
        branch.step(torch.where(changed[..., walk.layer], instead, actions))
        branches.append(branch.follow(routes).losses())
        walk.step(actions)
    return (walk.losses() - torch.stack(branches)).float()


def _effect(gains: Tensor, can: Tensor, changed: Tensor) -> Effect:
    """Of one layer, from (W, T) each."""
    share, count, others = can.float().mean().item(), changed.sum(), (gains * ~changed).sum(1)
    if count < _LEAST:
        return Effect(share, torch.nan, torch.nan, torch.nan)
    error = others.std() * len(others) ** 0.5 / count
    return Effect(share, gains[changed].mean().item(), (others.sum() / count).item(), error.item())
