"""How many tokens to draft, so that most tokens are generated per second.

It pays to draft one more token if the probability that it is kept is higher than what the same time brings at the
present speed (the marginal value theorem). The times are measured as they come. The probability that a token is kept is
learned from what was kept, by the probability that the draft itself gives the token.

Passes with drafts and passes without are both measured for as long as text is generated: after some passes of one kind
comes one of the other. So neither a slow first pass nor a bad first draft decides for ever.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from statistics import median

_RECENT = 0.1  # weight of a new measurement in a running mean
_BINS = 10  # of the draft's own probability
_PRIOR = 2.0  # tokens: how much the draft's own probability counts, until more has been seen
_RECENT_PASSES = 0.02  # the same for the speed with drafts, which varies more
_TRIES, _TRUST = 4, 0.4
_PATIENCE = 4, 256  # passes of one kind before one of the other: at first, and at most
_SINGLES = 3, 9  # passes that verify nothing: so many come first, and so many of the last ones count
_MOST = 64  # tokens


class _Patience:
    """Says after how many passes to try what has seemed worse; the longer, the oftener this has been tried."""

    def __init__(self) -> None:
        self._passes, self._length = 0, _PATIENCE[0]

    def ends(self) -> bool:
        """Whether to try it in this pass; to be asked in every pass."""
        self._passes += 1
        if self._passes < self._length:
            return False
        self._passes, self._length = 0, min(2 * self._length, _PATIENCE[1])
        return True


class Pace:
    """Decides how many tokens to draft, from what earlier drafts cost and brought.

    Attributes:
        slope: seconds that each token to verify adds.
        draft: seconds to draft a token.
        kept: share of the drafted tokens that are kept.
        found: the same of tokens that were looked up in the text.
    """

    def __init__(self) -> None:
        self.slope: float | None = None
        self.draft: float | None = None
        self.kept, self.found = 0.5, 0.8
        self._seen = [[_PRIOR * (place + 0.5) / _BINS, _PRIOR] for place in range(_BINS)]  # kept, tried
        self._tokens, self._seconds, self._tries = 0.0, 0.0, 0  # of the passes with a draft
        self._singles: deque[float] = deque(maxlen=_SINGLES[1])
        self._drafting, self._looking_up = _Patience(), _Patience()

    @property
    def single(self) -> float | None:
        """Seconds of a pass that verifies nothing, the median of the last ones; None until there are some."""
        return median(self._singles) if len(self._singles) >= _SINGLES[0] else None

    @property
    def speed(self) -> float:
        """Tokens per second: the speed with drafts, or that without if this is higher."""
        if self.single is None:
            return 0.0
        return max(self._tokens / self._seconds if self._tries else 0.0, 1 / self.single)

    def another(self, drafted: Sequence[float]) -> bool:
        """Whether to draft one more token, after those to which the draft gave these probabilities."""
        if self.single is None or len(drafted) >= _MOST:
            return False  # the time of a pass without drafts comes first
        if not drafted:
            return self._drafts_pay() != self._drafting.ends()
        if self.draft is None or self.slope is None:
            return len(drafted) < 2
        chance = self.kept
        for probability in drafted:
            kept, tried = self._seen[_bin(probability)]
            chance *= kept / tried
        return chance > self.speed * (self.draft + self.slope)

    def _drafts_pay(self) -> bool:
        """Whether passes with a draft have been faster; the fewer there were, the more they are trusted to be."""
        assert self.single is not None
        if self._tries < _TRIES:
            return True
        return self._tokens / self._seconds * (1 + _TRUST / self._tries**0.5) > 1 / self.single

    def lookups(self) -> int:
        """How many tokens to verify that were looked up in the text, which costs no draft."""
        price = self.speed * (self.slope or 0.0)
        if self.found <= price:
            return int(self._looking_up.ends())
        return _MOST if price == 0 else min(_MOST, 1 + int(math.log(price) / math.log(min(self.found, 0.99))))

    def learn(self, drafted: Sequence[float], kept: int) -> None:
        """Of drafted tokens with these probabilities, so many were kept."""
        for place, probability in enumerate(drafted[: kept + 1]):  # those after the first refused one were not tried
            seen = self._seen[_bin(probability)]
            seen[0] += place < kept
            seen[1] += 1
            self.kept = _mean(self.kept, float(place < kept))

    def learn_lookups(self, count: int, kept: int) -> None:
        """Of so many tokens that were looked up, so many were kept."""
        for place in range(min(count, kept + 1)):
            self.found = _mean(self.found, float(place < kept))

    def clock(self, drafted: int, drafting: float, verified: int, verifying: float, tokens: int) -> None:
        """The seconds of a draft and of a pass, and how many tokens came of them."""
        if drafted:
            self.draft = _mean(self.draft, drafting / drafted)
        single = self.single
        if not verified:
            self._singles.append(verifying)
        elif single is not None:
            self.slope = _mean(self.slope, max(0.0, verifying - single) / verified)
        if drafted:
            self._tries += 1
            weight = max(_RECENT_PASSES, 1 / self._tries)
            self._tokens += weight * (tokens - self._tokens)
            self._seconds += weight * (drafting + verifying - self._seconds)


def _mean(before: float | None, value: float) -> float:
    return value if before is None else before + _RECENT * (value - before)


def _bin(probability: float) -> int:
    return min(int(probability * _BINS), _BINS - 1)
