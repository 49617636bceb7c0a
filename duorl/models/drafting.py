"""Self-speculative decoding: a router drafts tokens on a cheap route, and one pass of the model verifies them.

It is a candidate generator for transformers' assisted generation, which verifies: greedy tokens are those of the model,
and sampled ones have its distribution (rejection sampling, Leviathan et al. 2023). Drafts and verification share one
cache, so a draft reads the model's own keys and values of all earlier tokens. What a draft writes into the cache is
removed before the verification writes its own.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.candidate_generator import CandidateGenerator, PromptLookupCandidateGenerator

from duorl.models.pace import Pace

if TYPE_CHECKING:
    from duorl.models.modeling import DuoForCausalLM

_CACHES = ("cache", "past_key_values")  # transformers' names for it, new and old


@dataclass
class Drafts:
    """How one call of `generate` drafts, and what came of it.

    Attributes:
        length: how many tokens to draft: a number, or a `Pace` that decides.
        passes: passes of the model after that over the prompt.
        drafted: drafted tokens; those that were looked up in the text are counted too.
        accepted: drafted tokens that were kept.
    """

    length: int | Pace
    passes: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that were kept; nan without drafts."""
        return self.accepted / self.drafted if self.drafted else float("nan")

    @property
    def tokens_per_pass(self) -> float:
        """Generated tokens per pass of the model; nan without a pass."""
        return (self.passes + self.accepted) / self.passes if self.passes else float("nan")


class Drafter(CandidateGenerator):
    """Drafts with a model that follows a cheap router, over the cache of the model that verifies.

    Args:
        model: a view with a router, see `DuoForCausalLM.with_router`.
        drafts: how to draft; it is told what comes of it.
        config: of the generation.
        processors: of the logits; drafts are chosen with them too.
        criteria: what ends a text; no token is drafted after that.
        arguments: of the model's passes; they hold the cache, and the mask of the prompt.
        lookup: finds tokens in the text so far, which cost no draft; it is asked first.
    """

    def __init__(
        self,
        model: DuoForCausalLM,
        drafts: Drafts,
        config: GenerationConfig,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        arguments: dict[str, Any],
        lookup: PromptLookupCandidateGenerator | None = None,
    ):
        self.model, self.drafts, self.length = model, drafts, drafts.length
        self.config, self.processors, self.criteria, self.lookup = config, processors, criteria, lookup
        self._cache_name = next(name for name in _CACHES if arguments.get(name) is not None)
        self._cache, self._mask = arguments[self._cache_name], arguments.get("attention_mask")
        self._ends = criteria
        self._written: list[float] = []  # the draft's probabilities of its tokens
        self._found = 0  # tokens that were looked up
        self._most = config.max_length
        self._times: tuple[float, float] | None = None  # when its draft began and ended; None: no pass to learn from

    def get_candidates(self, input_ids: Tensor, **_: Any) -> tuple[Any, Any]:
        """The text (1, S) with a draft, (1, S + n), and the draft's logits (1, n, V); None if it was looked up."""
        began, self._times, self._written, self._found = time.perf_counter(), None, [], 0
        self._ends = _looking_ahead(self.criteria)
        if input_ids.shape[1] - self._cache.get_seq_length() > 1:
            return input_ids, None  # the pass over the prompt comes first
        text, logits = self._look_up(input_ids), None
        self._found = text.shape[1] - input_ids.shape[1]
        if not self._found:
            text, logits = self._draft(input_ids)
        self._times = began, time.perf_counter()
        if self._is_over(text):  # the verification adds a token of its own to a whole draft; not after the end
            self.config.max_length = text.shape[1]
        return text, logits

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        """Learn from what the verification kept."""
        self.config.max_length = self._most
        if self._times is None:
            return
        kept, count = int(num_matches), len(self._written) + self._found
        self.drafts.passes += 1
        self.drafts.drafted += count
        self.drafts.accepted += kept
        if isinstance(self.length, Pace):
            began, ended = self._times
            self.length.learn(self._written, kept)
            self.length.learn_lookups(self._found, kept)
            drafted, verifying = len(self._written), time.perf_counter() - ended
            self.length.clock(drafted, ended - began, count, verifying, kept + 1)

    def _look_up(self, text: Any) -> Tensor:
        """The text with tokens that followed its last ones before."""
        if self.lookup is None:
            return text
        found: Any = self.lookup.get_candidates(text)[0]
        most = self._room(text)
        if found.shape[1] > text.shape[1] and isinstance(self.length, Pace):
            most = min(most, self.length.lookups())
        found = found[:, : text.shape[1] + most]
        lengths = range(text.shape[1] + 1, found.shape[1])
        return found[:, : next((length for length in lengths if self._is_over(found[:, :length])), found.shape[1])]

    def _draft(self, text: Tensor) -> tuple[Tensor, Tensor | None]:
        """The text with drafted tokens, and their logits."""
        logits: list[Tensor] = []
        while self._room(text) > 0 and self._another():
            logits.append(self._next(text))
            text = torch.cat([text, self._chosen(logits[-1])], dim=1)
            if self._is_over(text):
                break
        if not logits:
            return text, None
        self._cache.crop(-len(logits))
        return text, torch.stack(logits, dim=1)

    def _another(self) -> bool:
        if isinstance(self.length, Pace):
            return self.length.another(self._written)
        return len(self._written) < self.length

    def _room(self, text: Tensor) -> int:
        """How many more tokens a draft can have: the verification itself gives one."""
        return self.config.max_length - text.shape[1] - 1

    def _next(self, text: Any) -> Tensor:
        """The draft's logits after a text, (1, V), as the generation changes them."""
        more: dict[str, Any] = {self._cache_name: self._cache}
        if self._mask is not None:
            new = text.shape[1] - self._mask.shape[1]
            mask = torch.cat([self._mask, self._mask.new_ones(1, new)], dim=1)
            more |= {"attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1}
        output = self.model(input_ids=text[:, -1:], use_cache=True, logits_to_keep=1, **more)
        return self.processors(text, output.logits[:, -1].float())

    def _chosen(self, logits: Tensor) -> Tensor:
        """The next token, (1, 1)."""
        shares = logits.softmax(-1)
        token = torch.multinomial(shares, 1) if self.config.do_sample else shares.argmax(-1, keepdim=True)
        self._written.append(shares.gather(1, token).item())
        return token

    def _is_over(self, text: Any) -> bool:
        return bool(self._ends(text, None).all())


def _looking_ahead(criteria: StoppingCriteriaList) -> StoppingCriteriaList:
    """The same criteria, to be asked about tokens that may be refused: what users' own ones count is copied."""
    return StoppingCriteriaList(
        one if type(one).__module__.startswith("transformers.") else _apart(one) for one in criteria
    )


def _apart(criterion: Any) -> Any:
    found = copy.copy(criterion)
    for name, value in vars(criterion).items():
        if isinstance(value, list | dict | set | Tensor):
            setattr(found, name, copy.deepcopy(value))
    return found
