"""What one call routed: a router that decides, and a record of every pass.

`generate` keeps one for each call, and its output has what it says. A forward pass takes one as its router:

    transcript = Transcript(router, model)
    model(input_ids=x, router=transcript)
    transcript.routes, transcript.compute, transcript.spent      # (B, T, L), (B, T), (B,)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from duorl.inputs import View

if TYPE_CHECKING:
    from duorl.models.modeling import DuoForCausalLM

NOT_ROUTED = -1
"""In place of an action: no pass has read the token, or its prediction was not used."""


class Decider(Protocol):
    """An object with `decide`, for example a `duorl.routers.Router`."""

    def decide(self, view: View) -> Tensor:
        """(B, T) action codes."""
        ...


RouterLike = Decider | Callable[[Tensor, int, Tensor], Tensor]
"""A decider, or a plain function from (hidden (B, T, d), layer, compute so far (B, T)) to actions (B, T)."""


def decision(router: RouterLike) -> Callable[[View], Tensor]:
    """The function of a router that decides from a view."""
    decider: Any = router
    if hasattr(decider, "decide"):
        return decider.decide
    return lambda view: decider(view.hidden, view.layer, view.compute)


def begin(router: RouterLike, model: DuoForCausalLM, tokens: Tensor) -> None:
    """Tell a router which texts (B, n) come, if it asks for that; n is 0 for embeddings."""
    if begins := getattr(router, "begin", None):
        begins(model, tokens)


@dataclass
class _Pass:
    """Routes (rows, T, L) from a position on; `alive` (rows,): whose text has not ended, None if all have not."""

    start: int
    routes: Tensor
    alive: Tensor | None


class Transcript:
    """A router that writes down what it decides during one call of `generate`, or of the model.

    Args:
        router: decides.
        model: the model that is called.
        price: nats per all-big pass, one for all prompts or (B,); None: that of the router.

    Raises:
        ValueError: the router was made for another model, or takes no such price.
    """

    def __init__(self, router: RouterLike, model: DuoForCausalLM, price: float | Tensor | None = None):
        if require_fit := getattr(router, "require_fit", None):
            require_fit(model)
        self._router, self._model = router, model
        self._decide = decision(router)
        self._price = None if price is None else _checked(price, router).to(model.device)
        self._generates = False
        self._reset(1)

    def _reset(self, texts: int) -> None:
        self._texts, self._start, self._prompt = texts, 0, 0
        self._passes: list[_Pass] = []
        self._mask: Tensor | None = None
        self._alive: Tensor | None = None
        self._length: int | None = None
        self._beams: Tensor | None = None

    def begin(self, model: DuoForCausalLM, tokens: Tensor) -> None:
        """Tell the router which texts (B, n) come, and forget earlier ones; passes of one `generate` are one text."""
        if not self._generates:
            self._reset(len(tokens))
            begin(self._router, model, tokens)

    def generating(self, tokens: Tensor, prompt: int) -> None:
        """`generate` goes on with texts (B, n), of which so many positions are there before the first new token."""
        self._generates = False
        self.begin(self._model, tokens)
        self._generates, self._prompt = True, prompt

    def at(self, start: int, mask: Tensor | None) -> None:
        """The next pass begins at this position; the mask (rows, positions so far) has 0 where padded."""
        self._start = start
        if not self._passes and mask is not None and mask.ndim == 2:
            self._mask = mask

    def decide(self, view: View) -> Tensor:
        """(rows, T), the router's actions; after the last layer, the routes are kept."""
        if self._price is not None:
            each = len(view.compute) // len(self._price)  # rows per prompt: beams, or several answers
            view = replace(view, price=self._price.repeat_interleave(each)[:, None])
        actions = self._decide(view)
        if view.layer + 1 == self._model.num_layers:
            self._passes.append(_Pass(self._start, torch.stack([*view.taken, actions], dim=-1), self._alive))
        return actions

    def ended(self, done: Tensor) -> None:
        """The texts of these rows (rows,) have ended, for whatever reason: what is read after that is not theirs."""
        self._alive = ~done if self._alive is None else self._alive & ~done

    def finish(self, new: int, beams: Tensor | None = None) -> None:
        """So many tokens were generated.

        Args:
            new: number of tokens.
            beams: (rows, n), by generated token the row of the pass that predicted it, -1 after the end.
        """
        self._generates, self._length, self._beams = False, self._prompt + new - 1, beams

    def latest(self, position: int) -> float:
        """Of one text, the compute that the last pass spent at a position."""
        last = self._passes[-1]
        return self._model.route_compute(last.routes[0, position - last.start]).item()

    @property
    def routes(self) -> Tensor:
        """(rows, S, L), the action codes of all positions that were read; `NOT_ROUTED` where there is none."""
        if not self._passes:
            return torch.empty(0, 0, self._model.num_layers, dtype=torch.int64)
        beams, length = self._beams, self._length
        if length is None:
            length = max(one.start + one.routes.shape[1] for one in self._passes)
        rows = len(self._passes[0].routes) if beams is None else len(beams)
        found = self._passes[0].routes.new_full((rows, length, self._model.num_layers), NOT_ROUTED)
        for one in self._passes:
            end, came = min(one.start + one.routes.shape[1], length), self._came(one, length)
            found[came >= 0, one.start : end] = one.routes[came[came >= 0], : end - one.start]
        if self._mask is not None:
            mask = self._mask if beams is None else self._mask[beams[:, 0]]
            found[:, : mask.shape[1]][mask[:, :length] == 0] = NOT_ROUTED
        return found

    def _came(self, one: _Pass, length: int) -> Tensor:
        """(rows,), by text the row of a pass that read it; -1 if none did."""
        if self._beams is None:
            rows = torch.arange(len(one.routes), device=one.routes.device)
            return rows if one.alive is None else rows.where(one.alive, NOT_ROUTED)
        new = max(0, min(one.start + one.routes.shape[1], length) - self._prompt)
        if new < self._beams.shape[1]:
            return self._beams[:, new]
        return torch.full_like(self._beams[:, 0], NOT_ROUTED)

    @property
    def compute(self) -> Tensor:
        """(rows, S), compute of these routes; nan where there is none."""
        return self._of(self.routes)

    def _of(self, routes: Tensor) -> Tensor:
        spent = self._model.route_compute(routes.clamp(min=0))
        return spent.masked_fill(routes[..., 0] == NOT_ROUTED, torch.nan)

    @property
    def spent(self) -> Tensor:
        """(B,), compute of all passes for a prompt, in all-big passes of one token.

        It counts what `compute` does not: several answers and beams, texts that were read again without a cache, and
        tokens that a verification refused. Padding and what is read after a text's end are not counted.
        """
        total = torch.zeros(self._texts, device=self._model.device)
        for one in self._passes:
            found = self._model.route_compute(one.routes)
            if self._mask is not None:
                mask = self._mask[:, one.start : one.start + found.shape[1]]
                found[:, : mask.shape[1]] *= mask
            if one.alive is not None:
                found = found * one.alive[:, None]
            total += found.sum(1).view(self._texts, -1).sum(1)
        return total


class Ends(StoppingCriteriaList):
    """transformers' criteria, which tell a transcript whose text has ended."""

    def __init__(self, criteria: StoppingCriteriaList, transcript: Transcript):
        super().__init__(criteria)
        self._transcript = transcript

    def __call__(self, input_ids: Any, scores: Any, **more: Any) -> Any:
        """(rows,), as in transformers."""
        done = super().__call__(input_ids, scores, **more)
        self._transcript.ended(done)
        return done


def _checked(price: float | Tensor, router: Any) -> Tensor:
    """One price per prompt, (B,) or (1,); each must be in the router's range."""
    prices = torch.as_tensor(price, dtype=torch.float32).flatten()
    if not hasattr(router, "at"):
        raise ValueError(f"price: {type(router).__name__} takes none")
    for each in prices.tolist():
        router.at(price=each)
    return prices
