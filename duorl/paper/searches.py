"""The best routes of every token with exactly k big layers: the oracle's, or those of a search.

`Exhaustive` tries all routes. `Searched` is for deep models: its routes may not be the best, so its losses are upper
bounds of the oracle's, and its returns lower bounds of the oracle's return. Both are in the reference context.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from duorl.costs import BIG, action_ids
from duorl.evaluation.bound import found_difficulty
from duorl.evaluation.difficulty import TokenRow, token_difficulty
from duorl.learners.labels import deviations
from duorl.models import DuoForCausalLM
from duorl.oracle import descent, exhaustive
from duorl.paper.measures import on_cpu
from duorl.routed_pass import RoutedPass, along, remember


class Search(Protocol):
    """Routes of windows (W, T+1) by their number of big layers.

    Attributes:
        exact: whether no route is better.
    """

    exact: bool

    def routes(self, big: int) -> Tensor:
        """(W, T, L), action codes."""

    def losses(self, budget: int | Tensor) -> Tensor:
        """(W, T) nats, with this number of big layers, or with one number per position, (T,)."""

    def of_patterns(self, routes: Tensor) -> Tensor:
        """Losses of fixed patterns (R, L), one for all tokens, as means of windows: (W, R)."""

    def draw(self, big: int, count: int, generator: torch.Generator) -> Tensor:
        """Random patterns with this number of big layers, (R, L); those that were drawn twice are there once."""

    def difficulty(self, count: int, tokenizer: PreTrainedTokenizerBase) -> list[TokenRow]:
        """Difficulty of the tokens of the first windows, or its lower bound."""


class Exhaustive:
    """All routes of windows; see `Search`.

    Raises:
        ValueError: too many routes, or too much memory for them.
    """

    exact = True

    def __init__(self, model: DuoForCausalLM, windows: Tensor, actions: Sequence[str] = ("small", "big")):
        self.table, self.windows = on_cpu(exhaustive(model, windows, actions=actions)), windows

    def routes(self, big: int) -> Tensor:
        """See `Search`."""
        return self.table.routes[self._best(big)]

    def losses(self, budget: int | Tensor) -> Tensor:
        """See `Search`."""
        return self.table.loss(self._best(budget))

    def of_patterns(self, routes: Tensor) -> Tensor:
        """See `Search`."""
        return self.table.losses[..., self.table.index_of(routes)].mean(1)

    def draw(self, big: int, count: int, generator: torch.Generator) -> Tensor:
        """See `Search`."""
        known = self.table.with_big(big).nonzero()[:, 0]
        return self.table.routes[known[torch.randint(len(known), (count,), generator=generator)].unique()]

    def difficulty(self, count: int, tokenizer: PreTrainedTokenizerBase) -> list[TokenRow]:
        """See `Search`."""
        few = replace(self.table, losses=self.table.losses[:count])
        return token_difficulty(few, self.windows[:count], tokenizer)

    def _best(self, budget: int | Tensor) -> Tensor:
        return self.table.best(allowed=self.table.with_big(budget))


class Searched:
    """The best of some routes of each token; see `Search`.

    Every token starts with the fixed patterns. Then, for some numbers of big layers, every layer of its best route is
    changed alone. The layers are ranked by what big is worth there, and for every k the k first layers become big.

    Args:
        model: a duo model.
        windows: (W, T+1).
        patterns: a fixed pattern for each of 0 to L big layers.
        bases: the numbers of big layers of the routes that are changed.
        actions: the cheaper action, and big.
        batch: windows at a time.
    """

    exact = False

    def __init__(
        self,
        model: DuoForCausalLM,
        windows: Tensor,
        patterns: Mapping[int, Sequence[int]],
        bases: Sequence[int],
        actions: Sequence[str] = ("small", "big"),
        batch: int = 16,
    ):
        self.model, self.windows, self.batch = model, windows, batch
        self.low, self.start = int(action_ids(actions)[0]), patterns[bases[len(bases) // 2]]
        found = []
        for tokens in windows.to(model.device).split(batch):
            best = _Best(model, tokens, torch.tensor([patterns[big] for big in sorted(patterns)]), self.low)
            for base in bases:
                best.improve(base)
            found.append((best.routes.cpu(), best.losses.cpu()))
        self._routes, self._losses = (torch.cat(column) for column in zip(*found, strict=True))

    def routes(self, big: int) -> Tensor:
        """See `Search`."""
        return self._routes[:, :, big].long()

    def losses(self, budget: int | Tensor) -> Tensor:
        """See `Search`."""
        index = torch.as_tensor(budget).expand(self._losses.shape[1])
        return self._losses[:, torch.arange(len(index)), index]

    @torch.no_grad()
    def of_patterns(self, routes: Tensor) -> Tensor:
        """See `Search`."""
        means = []
        for tokens in self.windows.to(self.model.device).split(self.batch):
            column = torch.empty(len(tokens), len(routes))
            walk = RoutedPass(self.model, tokens, context="reference")
            for index, done in along(walk, routes.to(tokens.device)):
                column[:, index.cpu()] = done.losses().mean(1, keepdim=True).cpu()
            means.append(column)
        return torch.cat(means)

    def draw(self, big: int, count: int, generator: torch.Generator) -> Tensor:
        """See `Search`."""
        depth = self.model.num_layers
        drawn = torch.full((count, depth), self.low)
        for route in drawn:
            route[torch.randperm(depth, generator=generator)[:big]] = BIG
        return drawn.unique(dim=0)

    def difficulty(self, count: int, tokenizer: PreTrainedTokenizerBase) -> list[TokenRow]:
        """See `Search`; by coordinate descent."""
        tokens = self.windows[:count].to(self.model.device)
        return found_difficulty(self.model, descent(self.model, tokens, start=self.start), tokens, tokenizer)


class _Best:
    """The best routes of tokens (B, T+1) so far.

    Attributes:
        routes: (B, T, L + 1, L) uint8, action codes, by the number of big layers.
        losses: (B, T, L + 1), nats.
    """

    @torch.no_grad()
    def __init__(self, model: DuoForCausalLM, tokens: Tensor, patterns: Tensor, low: int):
        self.model, self.low = model, low
        self.start = RoutedPass(model, tokens, context="reference", memory=remember(model, tokens))
        shape, depth = self.start.targets.shape, model.num_layers
        self.losses = torch.full((*shape, depth + 1), torch.inf, device=tokens.device)
        self.routes = torch.zeros(*shape, depth + 1, depth, dtype=torch.uint8, device=tokens.device)
        patterns = patterns.to(tokens.device)
        for index, done in along(self.start, patterns):
            self._offer(patterns[index[0]].expand(*shape, -1), done.losses())

    @torch.no_grad()
    def improve(self, base: int) -> None:
        """Change every layer of the best routes with so many big layers; try the k most valuable layers, for all k."""
        depth, routes = self.model.num_layers, self.routes[:, :, base].long()
        losses, _ = deviations(self.start, routes, [self.low, BIG])  # (L, B, T, 2)
        for layer in range(depth):
            other = routes.clone()
            other[..., layer] = torch.where(routes[..., layer] == BIG, self.low, BIG)
            self._offer(other, torch.where(routes[..., layer] == BIG, losses[layer, ..., 0], losses[layer, ..., 1]))
        rank = (losses[..., 0] - losses[..., 1]).argsort(0, descending=True).argsort(0).movedim(0, -1)  # (B, T, L)
        for big in range(1, depth):
            chosen = torch.where(rank < big, BIG, self.low)
            self._offer(chosen, self.start.fork().follow(chosen).losses())

    def _offer(self, routes: Tensor, losses: Tensor) -> None:
        """Keep routes (B, T, L) where their losses (B, T) are lower than those of as many big layers."""
        big = (routes == BIG).sum(-1, keepdim=True)  # (B, T, 1)
        better = losses[..., None] < self.losses.gather(-1, big)
        place = big[..., None].expand(*big.shape, routes.shape[-1])  # (B, T, 1, L)
        kept = torch.where(better, routes.to(self.routes.dtype), self.routes.gather(2, place)[:, :, 0])
        self.routes.scatter_(2, place, kept[:, :, None])
        self.losses.scatter_(-1, big, torch.where(better, losses[..., None], self.losses.gather(-1, big)))
