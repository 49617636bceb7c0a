"""The claims of the paper, compared with our measurements.

A claim *agrees* where the 95 % interval lies on the claimed side, *disagrees* where it lies on the other side, and is
*open* where it includes the border. What the border is stands in the measured sentence. A table
of many claims has many chances to be wrong: Holm's procedure says which verdicts hold for all claims together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import comb, inf
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from scipy.stats import t

from duorl.evaluation.statistics import Statistic, estimate, holm
from duorl.markdown import grid
from duorl.paper.measures import LOWER_BOUND

Numbers = dict[str, Any]
Interval = Sequence[float]


class Verdict(NamedTuple):
    """What an interval says of a border.

    Attributes:
        name: `agrees`, `disagrees` or `open`.
        margin: how far the border lies from the value, in half-widths of the 95 % interval; 0 where it is open.
    """

    name: str
    margin: float


@dataclass(frozen=True)
class Claim:
    """One claim of the paper and its measurement on one text.

    Attributes:
        figure: figure of the paper.
        paper: the claim.
        text: text of the measurement.
        measured: the measurement, with intervals.
        verdict: `agrees`, `disagrees` or `open`, by its own interval.
        oracle: `below` if it says that the oracle's loss is below something; `routes` if it is about the oracle's
            routes, or about differences of its losses; None if it is not about the oracle.
        holds: with 95 % confidence for all verdicts of the table together.
    """

    figure: str
    paper: str
    text: str
    measured: str
    verdict: Verdict
    oracle: Literal["below", "routes"] | None = None
    holds: bool = False

    @property
    def said(self) -> str:
        """The verdict, marked where it holds."""
        return self.verdict.name + "^" * self.holds


def claims(figures: Mapping[str, Numbers]) -> list[Claim]:
    """All claims about the given figures."""
    found = [*_oracle_claims(figures), *_schedule_claims(figures), *_pattern_claims(figures)]
    found += [*_router_claims(figures), *_difficulty_claims(figures), *_scaling_claims(figures)]
    if is_bound(figures):
        found = [_of_a_bound(claim) for claim in found]
    held = holm([_p(claim.verdict, _freedom(figures, claim.text)) for claim in found])
    found = [replace(claim, holds=holds) for claim, holds in zip(found, held, strict=True)]
    return sorted(found, key=lambda claim: claim.figure)  # a stable sort: claims of one figure stay together


def is_bound(figures: Mapping[str, Numbers]) -> bool:
    """Whether a search takes the oracle's place."""
    return figures["4b"].get("bound") == "lower bound"


BOUND_NOTE = (
    f"The routes of this model are too many to enumerate, so a search takes the oracle's place: a {LOWER_BOUND}. "
    "That the oracle is below something can then agree but not disagree, and claims about the oracle's routes stay "
    "open. The oracle in the routed context is left out."
)


def _of_a_bound(claim: Claim) -> Claim:
    """What a claim is worth if the oracle may be better than what was measured in its place."""
    if claim.oracle is None:
        return claim
    sure = claim.oracle == "below" and claim.verdict.name == "agrees"
    measured = f"with a {LOWER_BOUND} in place of the oracle: {claim.measured}"
    return replace(claim, measured=measured, verdict=claim.verdict if sure else Verdict("open", 0.0))


def _p(verdict: Verdict, freedom: float) -> float:
    """Two-sided, of a value at the border: the interval is symmetric, and its half-width a t quantile's."""
    return float(2 * t.sf(verdict.margin * t.isf(0.025, freedom), freedom))


def _freedom(figures: Mapping[str, Numbers], text: str) -> float:
    found = figures["4b"]["texts"][text]
    windows = torch.zeros(len(found["reference"]["oracle"][0]["windows"]))
    return estimate(windows, torch.tensor(found["files"]) if "files" in found else None).texts[0].freedom


def claims_page(figures: Mapping[str, Numbers], *, model: str, command: str) -> str:
    """`claims.md`: a table of all claims.

    Args:
        figures: numbers by the figure's name.
        model: name of the model.
        command: the command that made the numbers.
    """
    found = claims(figures)
    known = all("files" in found for found in figures["4b"]["texts"].values())
    counts = ", ".join(f"{sum(c.verdict.name == verdict for c in found)} {verdict}" for verdict in VERDICTS)
    lines = [
        f"# The claims of Duo-LLM on {model}",
        "",
        f"    {command}",
        "",
        "Losses in nats per token, on held-out text, in the reference context unless said. In brackets 95 % intervals",
        f"over {'files' if known else 'windows'}. The verdict is read off the interval: *open* where it includes the",
        "border. ^ it holds with 95 % confidence for all verdicts of the table together (Holm).",
        f"The paper has 12 layers; its budgets stand for the same shares of the layers here. {counts}.",
        *([BOUND_NOTE] if is_bound(figures) else []),
        "",
        grid(_HEAD, ([c.figure, c.paper, c.text, c.measured, c.said] for c in found)),
    ]
    return "\n".join(lines)


_HEAD = ("figure", "the paper", "text", "measured here", "verdict")


VERDICTS = ("agrees", "disagrees", "open")


def _verdict(interval: Interval, *, above: float | None = None, below: float | None = None) -> Verdict:
    """Whether an interval lies above (or below) a border."""
    low, high = interval
    border = above if above is not None else (below or 0.0)
    if not low <= border <= high:
        half = (high - low) / 2
        margin = abs((low + high) / 2 - border) / half if half > 0 else inf
        return Verdict("agrees" if (low > border) == (above is not None) else "disagrees", margin)
    return Verdict("open", 0.0)


def _within(interval: Interval, border: float) -> Verdict:
    """Whether an interval lies within a border on both sides of 0."""
    return _all([_verdict(interval, above=-border), _verdict(interval, below=border)])


def _all(verdicts: Sequence[Verdict]) -> Verdict:
    """The verdict on several numbers: it disagrees if one does, and agrees if all do."""
    for name in ("disagrees", "open"):
        if found := [verdict for verdict in verdicts if verdict.name == name]:
            return min(found, key=lambda verdict: verdict.margin)
    return min(verdicts, key=lambda verdict: verdict.margin, default=Verdict("open", 0.0))


def _steps(points: Sequence[Numbers], files: Sequence[int] | None) -> tuple[str, Verdict]:
    """Whether each point's loss is below that of the one before."""
    steps = [
        _estimated([later, earlier], files, lambda means: means[0] - means[1]) for earlier, later in pairwise(points)
    ]
    verdicts = [_verdict(step["mean_interval"], below=0) for step in steps]
    compute = ", ".join(f"{point['compute']:.2f}" for point in points)
    listed = ", ".join(f"{step['mean']:+.3f}" for step in steps)
    names = [verdict.name for verdict in verdicts]
    counts = f"{names.count('agrees')} of {len(names)} intervals below 0, {names.count('disagrees')} above"
    return f"routed context, compute {compute}; each loss minus the one before: {listed}; {counts}", _all(verdicts)


def _estimated(points: Sequence[Numbers], files: Sequence[int] | None, statistic: Statistic) -> Numbers:
    """A statistic of several points' losses, and its interval; a choice among the points is a part of it."""
    windows = torch.tensor([point["windows"] for point in points])
    found = estimate(windows[None], None if files is None else torch.tensor(files), statistic=statistic)
    return {"mean": found.value, "mean_interval": found.interval}


def _best_minus(end: int) -> Statistic:
    return lambda means: means.min() - means[end]


def _best_among(here: np.ndarray) -> Statistic:
    return lambda means: means[here].min() - means[~here].min()


def _number(values: Numbers, key: str = "mean") -> str:
    low, high = values[f"{key}_interval"]
    return f"{values[key]:+.3f} ({low:+.3f}, {high:+.3f})"


def _oracle_claims(figures: Mapping[str, Numbers]) -> Iterator[Claim]:
    for text, found in figures["4a"]["texts"].items():
        lead = found["best_random_minus_oracle"]
        fixed = figures["4b"]["texts"][text]["reference"]["fixed"]
        worth = fixed[0]["loss"] - fixed[-1]["loss"]
        yield Claim(
            "4a",
            "the oracle is far below the best of 100 random patterns",
            text,
            f"{figures['4a']['big']} big; best of the random patterns ({len(found['patterns'])} different ones drawn), "
            f"one for all tokens, minus oracle: {_number(lead)} (far: more than all-big gains over all-small, "
            f"{worth:.3f})",
            _verdict(lead["mean_interval"], above=worth),
            "below",
        )
    for text, found in figures["4b"]["texts"].items():
        curve, half = found["reference"]["oracle"], figures["4b"]["layers"] / 2
        best = min(curve, key=lambda point: point["loss"])
        middle = np.array([abs(point["big"] - half) <= 1 for point in curve])
        arms = [_estimated(curve, found.get("files"), _best_minus(end)) for end in (0, -1)]
        lead = _estimated(curve, found.get("files"), _best_among(middle))
        yield Claim(
            "4b",
            "the oracle's loss is a U over the budget, best at half of the layers",
            text,
            f"best at {best['big']} of {figures['4b']['layers']} big; there minus no big layer {_number(arms[0])}, "
            f"minus all-big {_number(arms[1])}; best within one layer of half minus best elsewhere {_number(lead)}",
            _all([_verdict(one["mean_interval"], below=0) for one in (*arms, lead)]),
            "routes",
        )
        yield Claim(
            "4b",
            "with one big layer the oracle is already below all-big",
            text,
            f"minus all-big: {_number(curve[1], 'minus_all_big')}",
            _verdict(curve[1]["minus_all_big_interval"], below=0),
            "below",
        )


def _schedule_claims(figures: Mapping[str, Numbers]) -> Iterator[Claim]:
    for kind in ("falling", "rising"):
        for text, found in figures["4c"]["texts"].items():
            schedule = found[kind]
            yield Claim(
                "4c",
                f"a budget {kind} along the sequence is worse than a constant one",
                text,
                f"{schedule['big'][0]} to {schedule['big'][-1]} big minus constant {found['constant']['big'][0]}: "
                f"{_number(schedule, 'minus_constant')}",
                _verdict(schedule["minus_constant_interval"], above=0),
                "routes",
            )


def _pattern_claims(figures: Mapping[str, Numbers]) -> Iterator[Claim]:
    for letter, where in (("a", "late"), ("b", "evenly"), ("c", "early")):
        numbers = figures[f"2{letter}"]
        for text, found in numbers["texts"].items():
            late, share = found["lateness"], numbers["big"] / numbers["layers"]
            if where == "evenly":
                layers = found["per_layer"]["mean_interval"]
                verdict = _all([_within([bound - share for bound in interval], _EVEN) for interval in layers])
                shares = ", ".join(f"{mean:.2f}" for mean in found["per_layer"]["mean"])
                measured = f"share of big by layer {shares} (evenly: within {_EVEN} of {share:.2f})"
            else:
                verdict = _verdict(late["mean_interval"], **({"above": 0} if where == "late" else {"below": 0}))
                measured = f"mean layer of big minus the middle, {numbers['big']} big: {_number(late)}"
            claim = f"with {_SHARES[letter]} of the layers big the oracle puts them {where}"
            yield Claim(f"2{letter}", claim, text, measured, verdict, "routes")
    for text, found in figures["2d"]["texts"].items():
        shares = found["per_layer"]
        layer = min(range(len(shares["mean"])), key=lambda index: shares["mean"][index])
        kept = [1 - share for share in reversed(shares["mean_interval"][layer])]  # of older files: without the choice
        low, high = found["most_skipped"]["mean_interval"] if "most_skipped" in found else kept
        yield Claim(
            "2d",
            "with skip, some layers are almost always skipped",
            text,
            f"layer {layer} is skipped by {1 - shares['mean'][layer]:.1%} ({low:.1%}, {high:.1%}) of the tokens "
            "(almost always: 90 %)",
            _verdict((low, high), above=0.9),
            "routes",
        )
        exits = found["early_exits"]
        low, high = exits["mean_interval"]
        border = 2 / comb(figures["2d"]["layers"], figures["2d"]["big"])
        yield Claim(
            "2d",
            "with skip, no early-exit shape shows",
            text,
            f"{exits['mean']:.1%} ({low:.1%}, {high:.1%}) of the routes skip all layers after the first skipped one "
            f"(none shows: under twice chance, {border:.1%})",
            _verdict((low, high), below=border),
            "routes",
        )


_EVEN = 0.15  # of the tokens
_SHARES = {"a": "a third", "b": "half", "c": "two thirds"}


def _router_claims(figures: Mapping[str, Numbers]) -> Iterator[Claim]:
    for text, found in figures["4a"]["texts"].items():
        lead = found["fixed_minus_oracle"]["mean"]
        yield Claim(
            "4a",
            "the learned router is near fixed patterns",
            text,
            f"soft router minus fixed patterns of the same compute: {_number(found['soft_minus_fixed'])}; the oracle "
            f"is {lead:.3f} below them (near: within a tenth of that)",
            _within(found["soft_minus_fixed"]["mean_interval"], 0.1 * lead),
            "below",
        )
    for text, found in figures["4b"]["texts"].items():
        curves = found["routed"]
        for kind, said in (
            ("fixed", "the best fixed pattern improves with every big layer"),
            ("soft", "the learned router improves with its budget"),
        ):
            points = sorted(curves[kind], key=lambda point: point["compute"])
            measured, verdict = _steps(points, found.get("files"))
            yield Claim("4b", said, text, measured, verdict)
    for favour, key in (("late layers", "lateness"), ("early tokens", "early_tokens")):
        for text, found in figures["3b"]["texts"].items():
            yield Claim(
                "3",
                f"the learned router favours {favour}",
                text,
                {
                    "lateness": "soft router, mean layer of big minus the middle: ",
                    "early_tokens": "soft router, share of big in the first quarter of the window minus the last: ",
                }[key]
                + _number(found[key]),
                _verdict(found[key]["mean_interval"], above=0),
            )


def _difficulty_claims(figures: Mapping[str, Numbers]) -> Iterator[Claim]:
    for text, found in figures["5"]["texts"].items():
        overlap = found["overlap_of_top_tenths"]
        yield Claim(
            "5, 6",
            "the hard tokens are not those of large loss: difficulty is what compute can still remove",
            text,
            f"of the tenth of tokens with the largest loss {overlap['mean']:.0%} are in the tenth of the largest "
            f"difficulty (not those: under 80 %); rank correlation of the two {_number(found['rank_correlation'])}",
            _verdict(overlap["mean_interval"], below=0.8),
            "routes",
        )


def _scaling_claims(figures: Mapping[str, Numbers]) -> Iterator[Claim]:
    for text, models in figures.get("8c", {"texts": {}})["texts"].items():
        points = models["small beside frozen big"]
        verdicts = [_verdict(p["rival"]["accuracy_interval"], below=0) for p in points if p["big_share"] < 1]
        listed = "; ".join(f"{p['big_share']:g}: {_number(p['rival'], 'accuracy')}" for p in points)
        yield Claim(
            "8c",
            "a small network added to a frozen big one is clearly worse than both from scratch",
            text,
            f"accuracy minus that of both from scratch, by share of big: {listed}",
            _all(verdicts),
        )
