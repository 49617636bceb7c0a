"""How many tokens to draft, so that most tokens are generated per second.

It pays to draft one more token if the probability that it is kept is higher than what the same time brings at the
present speed (the marginal value theorem). The times are measured as they come. The probability that a token is kept is
learned from what was kept, by the probability that the draft itself gives the token.

A machine becomes faster and slower while it works. So all costs are in *passes*: the time of a pass that verifies
nothing, now. A pass with a draft tells it too, because neighbours of both kinds tell what a verified token adds. After
some passes of one kind comes one of the other, for as long as text is generated.
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
_WARM_UP, _FIRST = 2, 4  # passes whose time does not count; passes without drafts at the beginning
_PAIRS = 9  # of neighbours that tell what a verified token adds
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
        single: seconds of a pass that verifies nothing; None before the first.
        draft: passes to draft a token.
        kept: share of the drafted tokens that are kept.
        found: the same of tokens that were looked up in the text.
    """

    def __init__(self) -> None:
        self.single: float | None = None
        self.draft: float | None = None
        self.kept, self.found = 0.5, 0.8
        self._seen = [[_PRIOR * (place + 0.5) / _BINS, _PRIOR] for place in range(_BINS)]  # kept, tried
        self._tokens, self._cost, self._tries = 0.0, 0.0, 0  # of the passes with a draft
        self._passes, self._last = 0, (0, 0.0)  # all passes; tokens that the last one verified, and its seconds
        self._slopes: deque[float] = deque(maxlen=_PAIRS)
        self._drafting, self._looking_up = _Patience(), _Patience()

    @property
    def slope(self) -> float | None:
        """Passes that each token to verify adds; None before the first pair of neighbours."""
        return max(0.0, median(self._slopes)) if self._slopes else None

    @property
    def speed(self) -> float:
        """Tokens per pass: with drafts, or 1 without if this is more."""
        return max(self._tokens / self._cost if self._tries else 0.0, 1.0)

    def another(self, drafted: Sequence[float]) -> bool:
        """Whether to draft one more token, after those to which the draft gave these probabilities."""
        if self._passes < _FIRST or len(drafted) >= _MOST:
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
        if self._tries < _TRIES:
            return True
        return self._tokens / self._cost * (1 + _TRUST / self._tries**0.5) > 1

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
        last, self._last = self._last, (verified, verifying)
        self._passes += 1
        if self._passes <= _WARM_UP:
            return
        if (last[0] == 0) != (verified == 0):
            (_, single), (count, longer) = sorted([last, self._last])
            self._slopes.append((longer / single - 1) / count)
        self.single = _mean(self.single, verifying / (1 + (self.slope or 0.0) * verified))
        if drafted:
            self.draft = _mean(self.draft, drafting / drafted / self.single)
            self._tries += 1
            weight = max(_RECENT_PASSES, 1 / self._tries)
            self._tokens += weight * (tokens - self._tokens)
            self._cost += weight * ((drafting + verifying) / self.single - self._cost)


def _mean(before: float | None, value: float) -> float:
    return value if before is None else before + _RECENT * (value - before)


def _bin(probability: float) -> int:
    return min(int(probability * _BINS), _BINS - 1)
