"""MixedRouter: one of several routers for each text, drawn by shares.

Whatever lies between two routers in compute and loss can be had by such a draw (`duorl.evaluation.Frontier`). So it is
the simplest rival of a learned router, and a way to meet a compute that no single router spends.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from duorl.inputs import View
from duorl.routers import base
from duorl.routers.base import Router

if TYPE_CHECKING:
    from duorl.models.modeling import DuoForCausalLM

_drawn: ContextVar[WeakKeyDictionary[Router, Tensor] | None] = ContextVar("drawn", default=None)
"""By router, the part of each row of the texts that this thread's last `begin` announced, (B,)."""


class MixedRouter(Router):
    """Draws one of several routers for each text, which then decides for all of its tokens.

    The draw is a hash of the seed and the text, without its last token and what fills it up at its ends. So a text
    always has the same router, in any batch.

    Args:
        routers: the parts; or, when they are loaded from a file, the name and `config` of each one's class.
        shares: probability of each part; they sum to 1.
        seed: seed of the draws.

    Raises:
        ValueError: there is no part, or not one share for each, or the shares do not sum to 1, or parts are for models
            of different sizes.
    """

    def __init__(self, routers: Sequence[Router | dict[str, Any]], shares: Sequence[float], seed: int = 0):
        parts = [base.rebuilt(router) if isinstance(router, dict) else router for router in routers]
        shares = [float(share) for share in shares]
        super().__init__(routers=[base.described(part) for part in parts], shares=shares, seed=int(seed))
        if not parts or len(shares) != len(parts) or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"{len(parts)} routers need as many shares, at least 0 and 1 in sum, not {shares}")
        self._parts = nn.ModuleList(parts)
        self.sizes()

    @property
    def parts(self) -> list[Router]:
        """The routers."""
        return [part for part in self._parts if isinstance(part, Router)]

    @property
    def trained_for(self) -> dict[str, Any] | None:  # type: ignore[override]
        """That of the first part that has one."""
        return next((part.trained_for for part in self.parts if part.trained_for is not None), None)

    @trained_for.setter
    def trained_for(self, record: dict[str, Any] | None) -> None:
        for part in self.parts:
            part.trained_for = record

    def sizes(self) -> tuple[int | None, int | None]:
        """Those of the parts.

        Raises:
            ValueError: they differ.
        """
        columns = zip(*(part.sizes() for part in self.parts), strict=True)
        every = [{size for size in sizes if size is not None} for sizes in columns]
        if any(len(known) > 1 for known in every):
            raise ValueError(f"the routers of a mixture are for models of different sizes: {every}")
        layers, hidden_size = (next(iter(known), None) for known in every)
        return layers, hidden_size

    @property
    def takes_price(self) -> bool:
        """Whether a part takes one; see `Router.takes_price`."""
        return any(part.takes_price for part in self.parts)

    def at(self, *, price: float) -> MixedRouter:
        """The mixture with the parts at a price that take one; see `Router.at`."""
        if not self.takes_price:
            raise ValueError("no router of this mixture takes a price")
        parts = [part.at(price=price) if part.takes_price else part for part in self.parts]
        return MixedRouter(parts, self.config["shares"], self.config["seed"])

    def flops(self) -> float:
        """The mean of the parts'; see `Router.flops`."""
        return sum(share * part.flops() for share, part in zip(self.config["shares"], self.parts, strict=True))

    def begin(self, model: DuoForCausalLM, tokens: Tensor) -> None:
        """Draw a part for each row of tokens (B, n); see `Router.begin`."""
        for part in self.parts:
            part.begin(model, tokens)
        fills = _fills(model)
        places = torch.tensor([self._place(_text(row, fills)) for row in tokens.tolist()])
        _drawn.set(WeakKeyDictionary({**(_drawn.get() or {}), self: places.to(tokens.device)}))

    def _place(self, row: Sequence[int]) -> int:
        said = ",".join(map(str, (self.config["seed"], *row)))
        drawn = int.from_bytes(hashlib.sha256(said.encode()).digest()[:8], "big") / 2**64
        ends = torch.tensor(self.config["shares"], dtype=torch.float64).cumsum(0)
        return min(int((drawn >= ends).sum()), len(ends) - 1)

    def decide(self, view: View) -> Tensor:
        """(B, T), the actions of each row's part; see `Router.decide`.

        Raises:
            ValueError: `begin` was not called with these texts.
        """
        known = _drawn.get()
        places = None if known is None else known.get(self)
        if places is None or len(view.compute) % len(places):
            raise ValueError("a mixture draws for each text: call router.begin(model, tokens) before the pass")
        rows = places.repeat_interleave(len(view.compute) // len(places))  # beams, or several answers, of one text
        found = torch.stack([part.decide(view) for part in self.parts])
        return found[rows.to(found.device), torch.arange(len(rows), device=found.device)]

    def forward(self, hidden: Tensor, layer: int, compute: Tensor) -> Tensor:
        """(B, T), `decide` with a view that has only these three values; see `Router.forward`."""
        return self.decide(View(hidden, layer, compute))


def _fills(model: DuoForCausalLM) -> set[int]:
    """The tokens that others fill up a text with, to the length of its batch."""
    settings, found = model.generation_config, {0}
    for tokens in (settings.pad_token_id, settings.eos_token_id):
        if tokens is not None:
            found.update(torch.as_tensor(tokens).flatten().tolist())
    return found


def _text(row: Sequence[int], fills: set[int]) -> Sequence[int]:
    """The tokens of a text but the last, without those at its ends that may fill it up."""
    own = [place for place, token in enumerate(row) if token not in fills]
    return row[own[0] : own[-1]] if own else ()
