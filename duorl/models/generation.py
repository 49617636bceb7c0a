"""Generation: transformers' own `generate` with a router, which also says what was routed.

found = model.generate(ids, router=router, return_dict_in_generate=True)
found.routes, found.compute, found.spent             # (B, S, L), (B, S) and (B,)
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, StoppingCriteriaList
from transformers.generation import GenerationMode
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.utils import ModelOutput

from duorl.models.drafting import Drafter, Drafts
from duorl.models.pace import Pace
from duorl.models.transcript import Ends, RouterLike, Transcript


@dataclass
class _Generation:
    """One call of `generate`, for the methods that transformers calls; it hands them no arguments of ours.

    Attributes:
        transcript: of the router that decides; None: every token takes big.
        drafts: None: nothing is drafted.
        draft: of the router that drafts.
        prompt: (B, P), the prompts; P is 0 for embeddings.
        criteria: what ends a text.
    """

    transcript: Transcript | None
    drafts: Drafts | None
    draft: Transcript | None
    prompt: Any = None
    criteria: Any = None


_current: ContextVar[_Generation | None] = ContextVar("generation", default=None)


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
            (B, S) tokens. With `return_dict_in_generate=True`, transformers' output. With a router, it has `routes`,
            (B, S - 1, L) action codes of all tokens but the last, which no pass reads, and `compute`, (B, S - 1): where
            a token is padding, or comes after the end, the action is -1 and the compute nan. It has `spent`, (B,): the
            compute of all passes for a prompt, in all-big passes of one token, with drafts and what was refused. With
            drafts, it has `drafts`, which counts what was drafted and kept.

        Raises:
            ValueError: a price that the router does not take; a router of another model; or as in transformers.
        """
        model: Any = self
        router = self.own_router if router is None else router
        if router is None and price is not None:
            raise ValueError("price: give a router too")
        if router is None and draft is None:
            return super().generate(inputs, *args, **options)
        transcript = router if isinstance(router, Transcript) or router is None else Transcript(router, model, price)
        call = _Generation(transcript, None, None)
        if draft is not None:
            if isinstance(draft_tokens, int) and draft_tokens < 0:
                raise ValueError(f"draft_tokens must be at least 0, not {draft_tokens}")
            call.drafts = Drafts(Pace() if draft_tokens is None else draft_tokens)
            call.draft = Transcript(draft, model)
            options["assistant_model"] = model.with_router(call.draft)
        token = _current.set(call)
        try:
            found = super().generate(inputs, *args, router=transcript, **options)
        finally:
            _current.reset(token)
        return _told(found, call) if isinstance(found, ModelOutput) else found

    def _validate_generation_mode(self, mode: Any, config: Any, more: Any) -> None:  # type: ignore[override]
        """As in transformers, and what has no drafts is refused."""
        transformers: Any = super()
        transformers._validate_generation_mode(mode, config, more)
        call = _current.get()
        if call is not None and call.drafts is not None and mode != GenerationMode.ASSISTED_GENERATION:
            raise ValueError("draft: beam search has no drafts: set num_beams to 1")

    def _prepare_model_inputs(self, *args: Any, **given: Any) -> Any:  # type: ignore[override]
        """As in transformers; routers begin here, where the prompts are known."""
        transformers: Any = super()
        found, name, rest = transformers._prepare_model_inputs(*args, **given)
        if (call := _current.get()) is not None:
            call.prompt = rest["input_ids"] if name == "inputs_embeds" else found
            if call.draft is not None and len(found) > 1:
                raise ValueError(f"draft: {len(found)} prompts: give one at a time")
            if call.draft is not None and name == "inputs_embeds":
                raise ValueError("draft: a prompt of embeddings has no drafts: give input_ids")
            for one in (call.transcript, call.draft):
                if one is not None:
                    one.generating(call.prompt, found.shape[1])
        return found, name, rest

    def _get_stopping_criteria(  # type: ignore[override]
        self, generation_config: Any, *args: Any, **given: Any
    ) -> StoppingCriteriaList:
        """As in transformers; the transcript is told of every end. Beams have an end of their own."""
        transformers: Any = super()
        criteria = transformers._get_stopping_criteria(generation_config, *args, **given)
        if (call := _current.get()) is None:
            return criteria
        call.criteria = criteria
        if call.transcript is None or generation_config.num_beams > 1:
            return criteria
        return Ends(criteria, call.transcript)

    def _get_candidate_generator(self, *args: Any, **given: Any) -> CandidateGenerator:  # type: ignore[override]
        """Ours, for a call of `generate` with a router; it may look up tokens without a draft."""
        transformers: Any = super()
        call, config = _current.get(), given["generation_config"]
        if call is None:
            return transformers._get_candidate_generator(*args, **given)
        if call.drafts is None:
            call.drafts = Drafts(0)
        lookup = None
        if config.prompt_lookup_num_tokens is not None:
            lookup = transformers._get_candidate_generator(*args, **{**given, "assistant_model": None})
        processors, passes = given["logits_processor"], given["model_kwargs"]
        return Drafter(given["assistant_model"], call.drafts, config, processors, call.criteria, passes, lookup)

    @wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The family's own: Phi-3 changes its rotary frequencies where a text grows long."""
        model: Any = self
        if isinstance(transcript := kwargs.get("router"), Transcript):
            cache = kwargs.get("cache", kwargs.get("past_key_values"))
            transcript.at(0 if cache is None else int(cache.get_seq_length()), kwargs.get("attention_mask"))
        return model.backbone.prepare_inputs_for_generation(*args, **kwargs)


def _told(found: Any, call: _Generation) -> Any:
    """The output of `generate` with what the call says."""
    read = torch.zeros(len(call.prompt), device=found.sequences.device)
    if call.transcript is not None:
        call.transcript.finish(found.sequences.shape[1] - call.prompt.shape[1], getattr(found, "beam_indices", None))
        found["routes"], found["compute"] = call.transcript.routes, call.transcript.compute
        read = read + call.transcript.spent
    elif call.drafts is not None:
        read = read + call.prompt.shape[1] + call.drafts.passes + call.drafts.drafted
    if call.drafts is not None:
        found["drafts"] = call.drafts
    found["spent"] = read if call.draft is None else read + call.draft.spent
    return found
