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
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.utils import ModelOutput

from duorl.inputs import View
from duorl.models.drafting import Drafter, Drafts
from duorl.models.pace import Pace

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

    def latest(self, position: int, count: int) -> list[Tensor]:
        """Of one text, the routes of so many positions of the last pass, (L,) each."""
        start, routes = self._passes[-1]
        return list(routes[0, position - start :][:count])

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
    drafts: Drafts | None = None  # of the view that drafts in one call of `generate`

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        inputs: Tensor | None = None,
        *args: Any,
        router: RouterLike | None = None,
        price: float | Tensor | None = None,
        draft: RouterLike | None = None,
        draft_tokens: int | Pace | None = None,
        **options: Any,
    ) -> Any:
        """transformers' `generate`, with a router that decides, or with one that drafts.

        Args:
            inputs: (B, P), the prompts; padded on the left, with an `attention_mask`.
            args: as in transformers.
            router: decides; by default that of `with_router`; without one, every token takes big.
            price: for a router for a range of prices, nats per all-big pass: one for all prompts, or (B,).
            draft: a cheap router that drafts tokens, which the model then verifies, see `duorl.models.drafting`; one
                prompt at a time. With `prompt_lookup_num_tokens`, tokens are first looked up in the text.
            draft_tokens: how many tokens to draft; by default a new `duorl.models.Pace` decides, from the times that it
                measures. Give your own to go on with what it learned.
            options: as in transformers.

        Returns:
            (B, S) tokens. With `return_dict_in_generate=True`, transformers' output, with two more parts: `routes`,
            (B, S - 1, L) action codes of all tokens but the last, which no pass reads; and `compute`, (B, S - 1). Where
            a token is padding, or comes after the end, the action is -1 and the compute nan. With `draft`, it has
            `drafts`, which counts what was drafted and kept.

        Raises:
            ValueError: a price that the router does not take; a router of another model; or as in transformers.
        """
        router = self.own_router if router is None else router
        if router is None and price is not None:
            raise ValueError("price: give a router too")
        model: Any = self
        prompt = next((given for given in (inputs, options.get("input_ids")) if given is not None), None)
        for one in (router, draft):
            if prompt is not None and (begin := getattr(one, "begin", None)):
                begin(model, prompt)
        if draft is not None:
            options["assistant_model"] = self._assistant(draft, draft_tokens, prompt, options)
        transcript = router if isinstance(router, Transcript) or router is None else Transcript(router, model, price)
        found = super().generate(inputs, *args, router=transcript, **options)
        if isinstance(found, ModelOutput):
            if transcript is not None:
                for name, value in self._said(transcript, found, prompt, options).items():
                    found[name] = value
            if draft is not None:
                found["drafts"] = options["assistant_model"].drafts
        return found

    def _assistant(
        self, draft: RouterLike, tokens: int | Pace | None, prompt: Tensor | None, options: dict[str, Any]
    ) -> DuoForCausalLM:
        """The view of the model that drafts."""
        model: Any = self
        beams = self._setting("num_beams", options)
        if prompt is not None and len(prompt) > 1:
            raise ValueError(f"draft: {len(prompt)} prompts: give one at a time")
        if (beams or 1) > 1:
            raise ValueError("draft: beam search has no drafts: set num_beams to 1")
        if isinstance(tokens, int) and tokens < 0:
            raise ValueError(f"draft_tokens must be at least 0, not {tokens}")
        view = model.with_router(draft)
        view.drafts = Drafts(Pace() if tokens is None else tokens)
        return view

    def _get_candidate_generator(self, *args: Any, **given: Any) -> CandidateGenerator:  # type: ignore[override]
        """Ours, if a view of this model drafts."""
        view: Any = given.get("assistant_model")
        transformers: Any = super()
        config = given["generation_config"]
        if (drafts := getattr(view, "drafts", None)) is None:
            return transformers._get_candidate_generator(*args, **given)
        lookup = None
        if config.prompt_lookup_num_tokens is not None:
            lookup = transformers._get_candidate_generator(*args, **{**given, "assistant_model": None})
        return Drafter(view, drafts, config, given["logits_processor"], given["model_kwargs"], lookup)

    def _said(
        self, transcript: Transcript, found: Any, prompt: Tensor | None, options: dict[str, Any]
    ) -> dict[str, Tensor]:
        """What was routed, aligned with the tokens that were found."""
        model: Any = self
        embedded, sequences = options.get("inputs_embeds"), found.sequences
        before = 0 if embedded is None else embedded.shape[1]  # positions that are not among the sequences
        first = before + (int(embedded is None) if prompt is None else prompt.shape[1])
        total = before + sequences.shape[1]
        routes = transcript.routes(first, total - 1, getattr(found, "beam_indices", None))
        ended = _ended(sequences[:, first - before :], self._ends(options))
        routes[:, first:][ended[:, :-1]] = NOT_ROUTED
        spent = model.route_compute(routes.clamp(min=0))
        return {"routes": routes, "compute": spent.masked_fill(routes[..., 0] == NOT_ROUTED, torch.nan)}

    def _ends(self, options: dict[str, Any]) -> list[int]:
        """The tokens that end a text."""
        ends = self._setting("eos_token_id", options)
        return [] if ends is None else torch.as_tensor(ends).flatten().tolist()

    def _setting(self, name: str, options: dict[str, Any]) -> Any:
        """A setting of this generation."""
        config = options.get("generation_config") or self.generation_config
        return options.get(name, getattr(config, name))

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
