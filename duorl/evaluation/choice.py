"""Choose the searches of an evaluation, and describe them before they start.

    choice = choose(model, training, held_out, actions=("small", "big"), options=EvaluationOptions())
    print(choice.text(flops_per_second(model, held_out)))

The choice depends on the model and on the options, and never on a training: a router that was trained for longer meets
the same rivals.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from duorl.costs import SMALL, Tally, action_ids
from duorl.evaluation.bound import BoundMethod, can_search
from duorl.evaluation.options import EvaluationOptions, SizedOptions
from duorl.models.modeling import DuoForCausalLM
from duorl.oracle import count_routes, descent_flops, tree_flops
from duorl.oracle.patterns import STARTS, PatternMethod, pattern_count, patterns_flops
from duorl.oracle.search import MEMORY_LIMIT, states_within
from duorl.routed_pass import RoutedPass

_ENUMERATED = 4096  # most routes that `auto` enumerates


@dataclass(frozen=True)
class Choice:
    """The chosen searches and their cost.

    Attributes:
        baseline: the method that finds the best fixed pattern.
        bound: the method that finds the bound.
        options: the options, with the number of windows that will be used.
        patterns: maximum number of fixed patterns that are ranked.
        routes: number of all routes, A^L.
        costs: FLOPs by part: `baseline` and `bound`.
        notes: sentences that say why the search is not larger.
    """

    baseline: PatternMethod
    bound: BoundMethod
    options: SizedOptions
    patterns: int
    routes: int
    costs: dict[str, float]
    notes: tuple[str, ...] = ()

    @property
    def rival(self) -> str:
        """How the best fixed pattern is chosen, for captions."""
        few = self.patterns < self.routes
        patterns = f"up to {self.patterns:,} of {self.routes:,}" if few else f"all {self.routes:,}"
        sizes = self.options
        quick = "quick, " if sizes.effort == "quick" else ""
        again = f"the best {sizes.finalists} again on {sizes.final_windows}"
        return (
            f"best fixed pattern: {quick}{self.baseline}, {patterns} patterns on {sizes.fixed_windows} windows, {again}"
        )

    def text(self, flops_per_second: float | None = None) -> str:
        """Sentences for the terminal; with seconds, if the speed of the machine is known."""

        def cost(part: str) -> str:
            return "" if flops_per_second is None else f", about {duration(self.costs[part] / flops_per_second)}"

        searched = f"on {self.options.reference_windows} windows{cost('bound')}"
        bound = {
            "exhaustive": f"bound: the exhaustive oracle, {self.routes:,} routes per token, {searched}",
            "descent": f"bound: coordinate descent, a lower bound of the oracle, {searched}",
            "none": "bound: none",
        }[self.bound]
        return " ".join([f"{self.rival}{cost('baseline')}; {bound}.", *self.notes])

    def __str__(self) -> str:
        return self.text()


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
) -> Choice:
    """Choose the searches of an evaluation.

    Args:
        model: a duo model.
        training: (W, T+1) of the router split.
        held_out: (W, T+1) of the evaluation split.
        actions: names of the allowed actions.
        options: the options; `auto` is decided here.

    Raises:
        ValueError: a search that was asked for by name is impossible: too many routes, too much memory, or a model
            without the reference context.
    """
    length = held_out.shape[1] - 1
    sizes = options.sized(model.num_layers).within(len(training), len(held_out))
    baseline, note = _baseline(model, length, actions, sizes)
    bound, other = _bound(model, held_out, actions, sizes)
    return Choice(
        baseline=baseline,
        bound=bound,
        options=replace(sizes, baseline=baseline, bound=bound),
        patterns=pattern_count(model.num_layers, actions, baseline),
        routes=len(action_ids(actions)) ** model.num_layers,
        costs=_costs(model, length, actions, baseline, bound, sizes),
        notes=tuple(filter(None, dict.fromkeys((note, other)))),
    )


def _baseline(
    model: DuoForCausalLM, length: int, actions: Sequence[str], options: SizedOptions
) -> tuple[PatternMethod, str]:
    """The method, and why it is not an exact one."""
    if options.baseline in ("program", "greedy"):
        return options.baseline, ""
    asked = options.baseline == "enumeration"
    try:
        check_searches(model, length, actions, options.fixed_windows)
        if not asked:
            _require_few(model, actions)
    except ValueError as error:
        if asked:
            raise ValueError(f"evaluation.baseline enumeration is impossible here, give greedy: {error}") from error
        return "greedy", _sentence(error)
    return "enumeration", ""


def _bound(
    model: DuoForCausalLM, held_out: Tensor, actions: Sequence[str], options: SizedOptions
) -> tuple[BoundMethod, str]:
    """The same for the bound."""
    if options.bound == "none":
        return "none", ""
    if reason := can_search(model, held_out[:1, :3]):
        if options.bound != "auto":
            raise ValueError(f"evaluation.bound {options.bound} is impossible here, give none: {reason}")
        return "none", _sentence(reason)
    if options.bound == "descent":
        return "descent", ""
    asked = options.bound == "exhaustive"
    try:
        check_searches(model, held_out.shape[1] - 1, actions, options.reference_windows)
        if not asked:
            _require_few(model, actions)
    except ValueError as error:
        if asked:
            raise ValueError(f"evaluation.bound exhaustive is impossible here, give descent: {error}") from error
        return "descent", _sentence(error)
    return "exhaustive", ""


def check_searches(model: DuoForCausalLM, length: int, actions: Sequence[str], *counts: int) -> None:
    """Refuse exhaustive searches that exceed the oracle's memory limit.

    Raises:
        ValueError: too many routes, or too much memory; the message says how much.
    """
    routes = count_routes(model.num_layers, actions)
    for count in counts:
        states_within(MEMORY_LIMIT, model, count, length, routes)


def _require_few(model: DuoForCausalLM, actions: Sequence[str]) -> None:
    if (routes := count_routes(model.num_layers, actions)) > _ENUMERATED:
        raise ValueError(f"{routes:,} routes are more than the {_ENUMERATED:,} that are enumerated by default")


def _sentence(reason: object) -> str:
    text = str(reason)
    return text[0].upper() + text[1:] + "."


def _costs(
    model: DuoForCausalLM,
    length: int,
    actions: Sequence[str],
    baseline: PatternMethod,
    bound: BoundMethod,
    options: SizedOptions,
) -> dict[str, float]:
    """FLOPs of both searches, in closed form."""
    finals = (model.num_layers + 1) * options.finalists  # of every number of big layers
    walk = tree_flops(model, actions, length, routes=min(finals, pattern_count(model.num_layers, actions, baseline)))
    ranked = patterns_flops(model, actions, length, baseline) * options.fixed_windows
    of_bound = {
        "exhaustive": lambda: tree_flops(model, actions, length),
        "descent": lambda: descent_flops(model, actions, length, starts=STARTS + 1),
        "none": lambda: 0.0,
    }[bound]()
    return {
        "baseline": (ranked + walk * options.final_windows) * length,
        "bound": of_bound * options.reference_windows * length,
    }
