"""What a choice gains its own token, and the tokens after it, which read its keys and values.

Tokens follow base routes. In one layer, some of them change their action. A token does not change what earlier ones
read, so what the tokens that did not change earn differs by the effect on later tokens alone: no noise of other
choices is in it. Policy gradients from returns cannot see this effect of one token among those of all others. What is
earned are the contextual parts of the environment's reward, in its unit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from duorl.costs import ACTIONS

if TYPE_CHECKING:
    from duorl.envs.dynamics import RoutingDynamics

_CHANGED = 0.25  # of the tokens that can change
_LEAST = 30  # changed tokens, for an estimate


@dataclass(frozen=True)
class Effect:
    """What another action in one layer gains, in the unit of the reward, per changed token.

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


def mean_effects(env: RoutingDynamics, windows: Tensor, *, seed: int = 0) -> Tensor:
    """What an action gains later tokens, in the mean of its layer, against the first action: (L, 3), by code.

    Args:
        env: plays the routes, and pays for them; without copies.
        windows: (W, T+1).
        seed: draws base routes, random ones of the allowed actions, and the tokens that change.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(env.codes), (*windows[:, 1:].shape, env.layers), generator=generator)
    routes, first = env.codes[drawn.to(env.codes.device)], int(env.codes[0])
    table = torch.zeros(env.layers, len(ACTIONS))
    for code in env.codes[1:].tolist():
        found = effects(env, windows, routes, chosen=first, instead=code, seed=seed)
        table[:, code] = torch.tensor([effect.later for effect in found]).nan_to_num()
    return table


@torch.no_grad()
def effects(
    env: RoutingDynamics,
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
        env: plays the routes, and pays for them; without copies.
        windows: (W, T+1).
        routes: (W, T, L), base routes, codes of allowed actions.
        chosen: the action of the tokens that can change.
        instead: their other action.
        share: share of these tokens that changes.
        seed: draws them.
        batch: windows per pass.
    """
    can = routes == chosen
    changed = can & (torch.rand(routes.shape, generator=torch.Generator().manual_seed(seed)) < share).to(can.device)
    parts = zip(windows.split(batch), routes.split(batch), changed.split(batch), strict=True)
    gains = torch.cat([_gains(env, *part, instead) for part in parts], dim=1)
    return [_effect(*layer) for layer in zip(gains, can.unbind(-1), changed.unbind(-1), strict=True)]


def _gains(env: RoutingDynamics, tokens: Tensor, routes: Tensor, changed: Tensor, instead: int) -> Tensor:
    """By how much each layer's changes raise what tokens earn, (L, B, T). The layers before are shared."""
    price = None if env.prices is None else torch.full((len(tokens),), (env.prices[0] * env.prices[1]) ** 0.5)
    env.reset(tokens, price=price)
    earned, branches = torch.zeros_like(env.compute), []
    while not env.done:
        actions = routes[..., env.layer]
        other, branch = torch.where(changed[..., env.layer], instead, actions), env.fork()
        gained = _decided(branch, other)
        while not branch.done:
            gained = gained + _decided(branch, routes[..., branch.layer])
        branches.append(earned + gained)
        earned = earned + _decided(env, actions)
    return (torch.stack(branches) - earned).float().view(-1, *changed.shape[:2])


def _decided(env: RoutingDynamics, actions: Tensor) -> Tensor:
    """Decide a layer by action codes (B, T); what it earns that depends on earlier tokens, (N,)."""
    env.step(torch.searchsorted(env.codes, actions.flatten().contiguous().to(env.codes.device)))
    return env.contextual()


def _effect(gains: Tensor, can: Tensor, changed: Tensor) -> Effect:
    """Of one layer, from (W, T) each."""
    share, count, others = can.float().mean().item(), changed.sum(), (gains * ~changed).sum(1)
    if count < _LEAST:
        return Effect(share, torch.nan, torch.nan, torch.nan)
    error = others.std() * len(others) ** 0.5 / count
    return Effect(share, gains[changed].mean().item(), (others.sum() / count).item(), error.item())
