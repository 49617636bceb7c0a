"""Generation: transformers' own `generate` with a router, which also says what was routed.

found = model.generate(ids, router=router, return_dict_in_generate=True)
found.routes, found.compute                          # (B, S, L) and (B, S)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.utils import ModelOutput

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


class Transcript:
    """A router that writes down what it decides during one call of `generate`.

    Args:
        router: decides.
        model: the model that generates.
        price: nats per all-big pass, one for all prompts or (B,); None: that of the router.

    Raises:
        ValueError: the router was made for another model, or takes no such price.
    """

    def __init__(self, router: RouterLike, model: DuoForCausalLM, price: float | Tensor | None = None):
        if require_fit := getattr(router, "require_fit", None):
            require_fit(model)
        self._decide, self._layers = decision(router), model.num_layers
        self._price = None if price is None else _checked(price, router).to(model.device)
        self._start = 0
        self._passes: list[tuple[int, Tensor]] = []
        self._mask: Tensor | None = None

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
        if view.layer + 1 == self._layers:
            self._passes.append((self._start, torch.stack([*view.taken, actions], dim=-1)))
        return actions

    def routes(self, prompt: int, length: int, beams: Tensor | None = None) -> Tensor:
        """The routes of all positions that were read, (rows, length, L); `NOT_ROUTED` where there is none.

        Args:
            prompt: number of positions before the first generated token.
            length: number of positions.
            beams: (rows, n), by generated token the row of the pass that predicted it, -1 after the end.
        """
        rows = len(self._passes[0][1]) if beams is None else len(beams)
        found = self._passes[0][1].new_full((rows, length, self._layers), NOT_ROUTED)
        for start, routes in self._passes:
            end = min(start + routes.shape[1], length)
            into = torch.arange(rows, device=found.device)
            if beams is not None:
                came = beams[:, max(0, end - prompt)] if end - prompt < beams.shape[1] else torch.full_like(into, -1)
                into, routes = into[came >= 0], routes[came[came >= 0]]
            found[into, start:end] = routes[:, : end - start]
        if self._mask is not None:
            mask = self._mask if beams is None else self._mask[beams[:, 0]]
            found[:, : mask.shape[1]][mask == 0] = NOT_ROUTED
        return found


class RoutedGenerationMixin(GenerationMixin):
    """transformers' generation for duo models."""

    own_router: RouterLike | None = None

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        inputs: Tensor | None = None,
        *args: Any,
        router: RouterLike | None = None,
        price: float | Tensor | None = None,
        **options: Any,
    ) -> Any:
        """transformers' `generate`, with a router.

        Args:
            inputs: (B, P), the prompts; padded on the left, with an `attention_mask`.
            args: as in transformers.
            router: decides; by default that of `with_router`; without one, every token takes big.
            price: for a router for a range of prices, nats per all-big pass: one for all prompts, or (B,).
            options: as in transformers.

        Returns:
            (B, S) tokens. With `return_dict_in_generate=True`, transformers' output, with two more parts: `routes`,
            (B, S - 1, L) action codes of all tokens but the last, which no pass reads; and `compute`, (B, S - 1). Where
            a token is padding, or comes after the end, the action is -1 and the compute nan.

        Raises:
            ValueError: a price that the router does not take; a router of another model; or as in transformers.
        """
        router = self.own_router if router is None else router
        if router is None:
            if price is not None:
                raise ValueError("price: give a router too")
            return super().generate(inputs, *args, **options)
        model: Any = self
        prompt = next((given for given in (inputs, options.get("input_ids")) if given is not None), None)
        if prompt is not None and hasattr(router, "begin"):
            router.begin(model, prompt)
        transcript = Transcript(router, model, price)
        found = super().generate(inputs, *args, router=transcript, **options)
        if isinstance(found, ModelOutput):
            embedded = options.get("inputs_embeds")
            before = 0 if embedded is None else embedded.shape[1]
            for name, value in self._said(transcript, found, prompt, before, options).items():
                found[name] = value
        return found

    def _said(
        self, transcript: Transcript, found: Any, prompt: Tensor | None, before: int, options: dict[str, Any]
    ) -> dict[str, Tensor]:
        """What was routed, aligned with the tokens that were found."""
        model: Any = self
        sequences, first = found.sequences, before + (1 if prompt is None and not before else 0)
        first += 0 if prompt is None else prompt.shape[1]
        total = before + sequences.shape[1]
        routes = transcript.routes(first, total - 1, getattr(found, "beam_indices", None))
        ended = _ended(sequences[:, first - before :], self._ends(options))
        routes[:, first:][ended[:, :-1]] = NOT_ROUTED
        spent = model.action_compute[torch.arange(routes.shape[-1], device=routes.device), routes.clamp(min=0)].sum(-1)
        return {"routes": routes, "compute": spent.masked_fill(routes[..., 0] == NOT_ROUTED, torch.nan)}

    def _ends(self, options: dict[str, Any]) -> list[int]:
        """The tokens that end a text."""
        config = options.get("generation_config") or self.generation_config
        ends = options.get("eos_token_id", config.eos_token_id)
        return [] if ends is None else torch.as_tensor(ends).flatten().tolist()

    @wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The family's own: Phi-3 changes its rotary frequencies where a text grows long."""
        model: Any = self
        if isinstance(transcript := kwargs.get("router"), Transcript):
            cache = kwargs.get("cache", kwargs.get("past_key_values"))
            transcript.at(0 if cache is None else int(cache.get_seq_length()), kwargs.get("attention_mask"))
        return model.backbone.prepare_inputs_for_generation(*args, **kwargs)


def _checked(price: float | Tensor, router: Any) -> Tensor:
    """One price per prompt, (B,) or (1,); each must be in the router's range."""
    prices = torch.as_tensor(price, dtype=torch.float32).flatten()
    if not hasattr(router, "at"):
        raise ValueError(f"price: {type(router).__name__} takes none")
    for each in prices.tolist():
        router.at(price=each)
    return prices


def _ended(tokens: Tensor, ends: list[int]) -> Tensor:
    """Where the end of a text has been generated, at this token or before it: (B, n) to (B, n)."""
    return torch.isin(tokens, torch.tensor(ends, dtype=tokens.dtype, device=tokens.device)).cumsum(1) > 0
