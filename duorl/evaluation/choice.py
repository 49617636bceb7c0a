"""Choose the searches of an evaluation by their cost, and describe them before they start.

    choice = choose(model, training, held_out, actions=("small", "big"), options=EvaluationOptions(), flops=...)
    print(choice.text(flops_per_second(model, held_out)))

Costs are FLOPs in closed form. The limit is the cost of the training. If nothing fits into this limit, fewer windows
are used.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from math import comb
from typing import Generic, TypeVar

import torch
from torch import Tensor

from duorl.costs import SMALL, Tally, action_ids
from duorl.evaluation.bound import BoundMethod, can_search
from duorl.evaluation.options import EvaluationOptions
from duorl.models.modeling import DuoForCausalLM
from duorl.oracle import count_routes, descent_flops, tree_flops
from duorl.oracle.patterns import STARTS, PatternMethod, pattern_count, patterns_flops
from duorl.oracle.search import MEMORY_LIMIT, states_within
from duorl.routed_pass import RoutedPass

DEFAULT_DECISIONS = 8_000_000
_PASSES = 2  # passes per token in training: the rollout, and that of the reference or the update
_LEAST_ALLOWANCE = 5e11  # some seconds, also after a very short training
_FIXED, _FINAL, _BOUND, _ROUTERS = "fixed_windows", "final_windows", "reference_windows", "windows"
_LEAST = {_FIXED: 8, _FINAL: 8, _BOUND: 2, _ROUTERS: 8, "finalists": 2}
"""With fewer, patterns are chosen by chance, and the baseline is weak."""


def training_flops(model: DuoForCausalLM, decisions: int, length: int) -> float:
    """Approximate FLOPs of a training: two half-big passes for every token.

    Args:
        model: a duo model.
        decisions: layer decisions of all learners together.
        length: tokens per window, T.
    """
    return _PASSES * decisions / model.num_layers * model.flops.token(torch.tensor(0.5), length).item()


@dataclass(frozen=True)
class Choice:
    """The chosen searches and their cost.

    Attributes:
        baseline: the method that finds the best fixed pattern.
        bound: the method that finds the bound.
        options: the options, with the number of windows that will be used.
        patterns: maximum number of fixed patterns that are ranked.
        routes: number of all routes, A^L.
        costs: FLOPs by part: `baseline`, `bound`, and `routers` (their measurement).
        flops: FLOPs of the training.
        notes: sentences that say why the search is not larger.
    """

    baseline: PatternMethod
    bound: BoundMethod
    options: EvaluationOptions
    patterns: int
    routes: int
    costs: dict[str, float]
    flops: float
    notes: tuple[str, ...] = ()

    def text(self, flops_per_second: float | None = None) -> str:
        """Sentences for the terminal; with seconds, if the speed of the machine is known."""

        def cost(part: str) -> str:
            share = f"{_percent(self.costs[part] / self.flops)} of the training's FLOPs"
            if flops_per_second is None:
                return share
            return f"about {duration(self.costs[part] / flops_per_second)}, {share}"

        few = self.patterns < self.routes
        patterns = f"up to {self.patterns:,} of {self.routes:,}" if few else f"all {self.routes:,}"
        bound = {
            "exhaustive": f"bound: the exhaustive oracle, {self.routes:,} routes per token, {cost('bound')}",
            "descent": f"bound: coordinate descent, a lower bound of the oracle, {cost('bound')}",
            "none": "bound: none",
        }[self.bound]
        sentence = f"best fixed pattern: {self.baseline}, {patterns} patterns, {cost('baseline')}; {bound}."
        return " ".join([sentence, *self.notes])

    def __str__(self) -> str:
        return self.text()


def _percent(share: float) -> str:
    return f"{100 * share:,.0f} %" if share >= 0.01 else "less than 1 %"


def duration(seconds: float) -> str:
    """A duration as text for the terminal."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


@torch.no_grad()
def flops_per_second(model: DuoForCausalLM, windows: Tensor, *, batch: int = 16) -> float:
    """Speed of the machine, measured on one batch of the windows (W, T+1), after a warm-up."""
    tally, seconds = Tally(), 0.0
    for tokens in (windows[:1], windows[:batch]):
        tally, started = Tally(), time.perf_counter()
        walk = RoutedPass(model, tokens.to(model.device), tally=tally).take_all(SMALL)
        walk.losses().cpu()  # waits for an accelerator
        seconds = time.perf_counter() - started
    return tally.flops / seconds


def choose(
    model: DuoForCausalLM,
    training: Tensor,
    held_out: Tensor,
    *,
    actions: Sequence[str],
    options: EvaluationOptions,
    flops: float | None = None,
    routers: int = 8,
) -> Choice:
    """Choose the searches of an evaluation.

    Args:
        model: a duo model.
        training: (W, T+1) of the router split.
        held_out: (W, T+1) of the evaluation split.
        actions: names of the allowed actions.
        options: the options; `auto` is decided here.
        flops: the limit, see `training_flops`; by default that of the default training.
        routers: number of routers to measure.

    Raises:
        ValueError: a search that was asked for by name is impossible: too many routes, too much memory, or a model
            without the reference context.
    """
    length = held_out.shape[1] - 1
    flops = training_flops(model, DEFAULT_DECISIONS, length) if flops is None else flops
    allowance = max(flops, _LEAST_ALLOWANCE)
    options = replace(
        options,
        fixed_windows=min(options.fixed_windows, len(training)),
        final_windows=min(options.final_windows, len(training)),
        windows=min(options.windows, len(held_out)),
        reference_windows=min(options.reference_windows, len(held_out)),
    )
    costs = _Costs(model, length, tuple(actions), routers)
    baselines, bounds = _possible_baselines(costs, options), _possible_bounds(costs, held_out, options)
    asked = options
    found = _first_that_fits(costs, baselines.methods, bounds.methods, options, allowance)
    if found is None:
        found, options = _fewer_windows(costs, baselines.methods, bounds.methods, options, allowance)
    baseline, bound = found
    notes = [baselines.note, "" if bounds.note == baselines.note else bounds.note]
    if (baseline, bound) != (baselines.methods[0], bounds.methods[0]):
        exact = costs.total(baselines.methods[0], bounds.methods[0], asked)
        notes.append(f"To search everything would cost {_percent(exact / flops)} of them.")
    if options != asked:
        notes.append(_fewer(asked, options))
    if options != asked and costs.total(baseline, bound, options) > allowance:
        notes.append("It still takes longer: with fewer windows the best fixed pattern would be chosen by chance.")
    return Choice(
        baseline=baseline,
        bound=bound,
        options=replace(options, baseline=baseline, bound=bound),
        patterns=pattern_count(model.num_layers, actions, baseline),
        routes=len(action_ids(actions)) ** model.num_layers,
        costs=costs.parts(baseline, bound, options),
        flops=flops,
        notes=tuple(filter(None, notes)),
    )


Methods = tuple[PatternMethod, BoundMethod]


class _Costs:
    """FLOPs of the parts of an evaluation, in closed form."""

    def __init__(self, model: DuoForCausalLM, length: int, actions: tuple[str, ...], routers: int):
        self.model, self.length, self.actions, self.routers = model, length, actions, routers
        self.one_pass = model.flops.token(torch.tensor(0.5), length).item()

    def by_windows(self, baseline: PatternMethod, bound: BoundMethod, options: EvaluationOptions) -> dict[str, float]:
        """FLOPs that are proportional to each of the numbers of windows."""
        walk = partial(tree_flops, self.model, self.actions, self.length)
        groups = self._patterns_per_big()
        finals = [min(options.finalists, count) for count in (sum(groups), *groups)]
        search: dict[str, Callable[[], float]] = {
            "exhaustive": walk,
            "descent": partial(descent_flops, self.model, self.actions, self.length, starts=STARTS + 1),
            "none": lambda: 0.0,
        }
        reference = (self.routers + 1) * self.one_pass if bound != "none" else 0.0
        per_token = {
            _FIXED: patterns_flops(self.model, self.actions, self.length, baseline),
            _FINAL: walk(routes=sum(count for count in finals if count > 1)),
            _BOUND: search[bound]() + reference,
            _ROUTERS: walk(routes=len(groups)) + (self.routers + 1) * self.one_pass,
        }
        return {name: flops * getattr(options, name) * self.length for name, flops in per_token.items()}

    def _patterns_per_big(self) -> list[int]:
        """Number of patterns for each number of big layers."""
        layers, others = self.model.num_layers, len(self.actions) - ("big" in self.actions)
        if "big" not in self.actions:
            return [others**layers]
        return [comb(layers, big) * others ** (layers - big) for big in range(layers + 1) if others or big == layers]

    def parts(self, baseline: PatternMethod, bound: BoundMethod, options: EvaluationOptions) -> dict[str, float]:
        """See `Choice.costs`."""
        flops = self.by_windows(baseline, bound, options)
        return {"baseline": flops[_FIXED] + flops[_FINAL], "bound": flops[_BOUND], "routers": flops[_ROUTERS]}

    def total(self, baseline: PatternMethod, bound: BoundMethod, options: EvaluationOptions) -> float:
        return sum(self.by_windows(baseline, bound, options).values())


_Method = TypeVar("_Method", bound=str)


@dataclass(frozen=True)
class _Possible(Generic[_Method]):
    """The possible methods, the most exact first, and why others are impossible."""

    methods: list[_Method]
    note: str = ""


def _possible_baselines(costs: _Costs, options: EvaluationOptions) -> _Possible[PatternMethod]:
    if options.baseline in ("program", "greedy"):
        return _Possible([options.baseline])
    try:
        check_searches(costs.model, costs.length, costs.actions, options.fixed_windows)
    except ValueError as error:
        if options.baseline == "enumeration":
            raise ValueError(f"evaluation.baseline enumeration is impossible here, give greedy: {error}") from error
        return _Possible(["greedy"], _sentence(error))
    return _Possible(["enumeration"] if options.baseline == "enumeration" else ["enumeration", "greedy"])


def _possible_bounds(costs: _Costs, held_out: Tensor, options: EvaluationOptions) -> _Possible[BoundMethod]:
    if options.bound == "none":
        return _Possible(["none"])
    if reason := can_search(costs.model, held_out[:1, :3]):
        if options.bound != "auto":
            raise ValueError(f"evaluation.bound {options.bound} is impossible here, give none: {reason}")
        return _Possible(["none"], _sentence(reason))
    if options.bound == "descent":
        return _Possible(["descent"])
    try:
        check_searches(costs.model, costs.length, costs.actions, options.reference_windows)
    except ValueError as error:
        if options.bound == "exhaustive":
            raise ValueError(f"evaluation.bound exhaustive is impossible here, give descent: {error}") from error
        return _Possible(["descent"], _sentence(error))
    return _Possible(["exhaustive"] if options.bound == "exhaustive" else ["exhaustive", "descent"])


def _sentence(reason: object) -> str:
    text = str(reason)
    return text[0].upper() + text[1:] + "."


def check_searches(model: DuoForCausalLM, length: int, actions: Sequence[str], *counts: int) -> None:
    """Refuse exhaustive searches that exceed the oracle's memory limit.

    Raises:
        ValueError: too many routes, or too much memory; the message says how much.
    """
    routes = count_routes(model.num_layers, actions)
    for count in counts:
        states_within(MEMORY_LIMIT, model, count, length, routes)


def _first_that_fits(
    costs: _Costs,
    baselines: list[PatternMethod],
    bounds: list[BoundMethod],
    options: EvaluationOptions,
    allowance: float,
) -> Methods | None:
    """The first combination that fits. An exact bound comes before an exact baseline: greedy is almost as good."""
    for bound in bounds:
        for baseline in baselines:
            if costs.total(baseline, bound, options) <= allowance:
                return baseline, bound
    return None


def _fewer_windows(
    costs: _Costs,
    baselines: list[PatternMethod],
    bounds: list[BoundMethod],
    options: EvaluationOptions,
    allowance: float,
) -> tuple[Methods, EvaluationOptions]:
    """The cheapest methods; the windows of the most expensive part are halved until all fits.

    The windows of a method that was asked for by name do not change.
    """
    methods = min(product(baselines, bounds), key=lambda both: costs.total(both[0], both[1], options))
    free = {_FIXED: "baseline", _FINAL: "baseline", _BOUND: "bound"}
    reducible = [name for name, part in free.items() if getattr(options, part) == "auto"]
    reducible += [_ROUTERS] if options.baseline == options.bound == "auto" else []
    while costs.total(*methods, options) > allowance:
        flops = costs.by_windows(*methods, options)
        dearest_first = sorted(reducible, key=flops.__getitem__, reverse=True)
        smaller = next(filter(None, (_half(options, name) for name in dearest_first)), None)
        if smaller is None:
            break
        options = smaller
    return methods, options


def _half(options: EvaluationOptions, name: str) -> EvaluationOptions | None:
    """Options with half of these windows, or with half of the finalists if there are too few windows; or None."""
    least = max(_LEAST[name], options.reference_windows) if name == _ROUTERS else _LEAST[name]
    if (count := getattr(options, name)) > least:
        return replace(options, **{name: max(least, count // 2)})
    return _half(options, "finalists") if name == _FINAL else None


_NAMES = {
    _ROUTERS: "windows for the routers",
    _BOUND: "windows for the bound",
    _FIXED: "windows to rank fixed patterns",
    _FINAL: "windows for their final",
    "finalists": "finalists",
}


def _fewer(asked: EvaluationOptions, options: EvaluationOptions) -> str:
    changed = [
        f"{getattr(options, name)} in place of {getattr(asked, name)} {what}"
        for name, what in _NAMES.items()
        if getattr(asked, name) != getattr(options, name)
    ]
    return f"Fewer than asked for, so that it takes no longer than the training: {', '.join(changed)}."
