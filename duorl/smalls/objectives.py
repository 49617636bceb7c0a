"""The losses of the stages `regress` and `distil`, and the losses that both are judged by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from duorl import ranks
from duorl.closeness import Target, minus_divergence
from duorl.costs import BIG, SMALL
from duorl.models.modeling import DuoForCausalLM
from duorl.models.trainer import random_routes
from duorl.routed_pass import RoutedPass
from duorl.smalls.recording import big_passes, in_own_precision, token_weights

# Shares of big that are drawn: 0, 1/8, ..., 7/8. They are few, because kernels are compiled for each size of a group;
# and one of them is never 1, with which no small network would run.
_SHARES = 8


def regress(model: DuoForCausalLM, tokens: Tensor, generator: torch.Generator) -> Tensor:
    """Relative squared error of small against big on big's own inputs, mean of tokens and layers, scalar.

    Every layer is fitted by itself, so derivatives pass through one small network only. 0 is a copy of big, 1 is what
    a network that writes zeros has. See `token_weights` for the weights.

    Args:
        model: a duo model.
        tokens: (B, T+1).
        generator: not used; all objectives have the same arguments.
    """
    losses = []
    for layer, read, written in big_passes(model, tokens):
        with in_own_precision(model):
            made = model.stack.ffns[layer].run(read, SMALL)
        error = (made.float() - written.float()).square().sum(-1)
        losses.append((error * token_weights(written)).mean())
    return torch.stack(losses).mean()


@dataclass(frozen=True)
class Distil:
    """All small networks together, under random routing with a new share of big in every batch.

    Args:
        target: `teacher` is KL(all-big || routed) in nats per token; `text` is the next-token loss.
    """

    target: Target = "teacher"

    def __call__(self, model: DuoForCausalLM, tokens: Tensor, generator: torch.Generator) -> Tensor:
        """The loss of windows (B, T+1), scalar."""
        count = tokens[:, 1:].numel()
        share = torch.randint(_SHARES, (), generator=generator).item() / _SHARES
        routes = random_routes(ranks.count() * count, model.num_layers, big_share=share, generator=generator)
        routes = ranks.own(routes).view(*tokens[:, 1:].shape, -1).to(tokens.device)
        with in_own_precision(model):
            walk = RoutedPass(model, tokens)
            teacher = walk.fork()
            walk.follow(routes)
            if self.target == "text":
                return walk.losses().mean()
            with torch.no_grad():
                teacher.take_all(BIG)
            return -walk.compare(teacher, minus_divergence).mean()


@torch.no_grad()
def held_out_losses(model: DuoForCausalLM, windows: Tensor, *, batch: int = 4, seed: int = 0) -> dict[str, float]:
    """Mean next-token loss in nats of `all_small`, `half_big` (at random) and `all_big` on windows (W, T+1)."""
    totals = dict.fromkeys(("all_small", "half_big", "all_big"), 0.0)
    generator = torch.Generator().manual_seed(seed)
    for tokens in windows.to(model.device).split(batch):
        shape = (*tokens[:, 1:].shape, model.num_layers)
        half = random_routes(tokens[:, 1:].numel(), model.num_layers, generator=generator).view(shape)
        routes = (torch.full(shape, SMALL), half, torch.full(shape, BIG))
        with in_own_precision(model):
            for name, actions in zip(totals, routes, strict=True):
                walk = RoutedPass(model, tokens).follow(actions.to(tokens.device))
                totals[name] += walk.losses().sum().item()
    return {name: total / windows[:, 1:].numel() for name, total in totals.items()}
