"""Router -> metrics, and the comparison of routers, with intervals.

Losses, compute and returns are those of the *routed* context, which is deployment. Regret and agreement are
measured in the *reference* context, where the oracle is exact, on fewer tokens. Every row says which is which.
"""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from duorl.checks import require_positive
from duorl.costs import ACTIONS, BIG, SMALL
from duorl.difficulty import token_difficulty, token_names
from duorl.models.attention import Memory
from duorl.models.modeling import DuoForCausalLM
from duorl.oracle import count_routes, exhaustive
from duorl.oracle.search import MEMORY_LIMIT, states_within
from duorl.routed_pass import Context, RoutedPass, remember
from duorl.routers import ConstantRouter, OracleRouter, PatternRouter, Router
from duorl.statistics import bootstrap_interval, sign_flip_test

_SHOWN_WINDOWS = 2


@dataclass(frozen=True)
class EvaluationOptions:
    """How routers are compared.

    Args:
        windows: windows of the evaluation split for losses in the routed context.
        reference_windows: windows of it for regret and agreement in the reference context, searched exhaustively.
        fixed_windows: windows of the router split on which all fixed patterns are enumerated.
        finalists: the best of them, measured again on `final_windows` windows of it to find the best one.
        final_windows: see `finalists`.
        batch: windows per pass.
        resamples: bootstrap resamples of windows for the 95 % intervals.
    """

    windows: int = 256
    reference_windows: int = 16
    fixed_windows: int = 32
    finalists: int = 8
    final_windows: int = 128
    batch: int = 16
    resamples: int = 2000

    def __post_init__(self) -> None:
        require_positive(**vars(self))
        if self.reference_windows > self.windows:
            raise ValueError(f"reference_windows {self.reference_windows} must be among the {self.windows} windows")


@dataclass(frozen=True)
class Measurement:
    """One router on W windows of T tokens.

    Attributes:
        loss: (W, T) nats.
        compute: (W, T), in [0, 1].
        routes: (W, T, L) int64, action codes.
        seconds: (batches,), wall time per token of each batch; the router's decisions are in it, `begin` is not.
    """

    loss: Tensor
    compute: Tensor
    routes: Tensor
    seconds: Tensor


def _stacked(seeds: Sequence[Measurement]) -> Measurement:
    """Measurements of the same windows as one, with a first axis S."""
    columns = zip(*(vars(measured).values() for measured in seeds), strict=True)
    return Measurement(*(torch.stack(column) for column in columns))


@torch.no_grad()
def measure(
    model: DuoForCausalLM,
    router: Router,
    windows: Tensor,
    *,
    context: Context = "routed",
    batch: int = 16,
    memories: Sequence[Memory] | None = None,
) -> Measurement:
    """Let a router decide for every token of some windows.

    Args:
        model: a duo model.
        router: decides.
        windows: (W, T+1).
        context: `routed` is deployment.
        batch: windows per pass.
        memories: one per batch for the reference context, where several routers share them.
    """
    parts = []
    for index, tokens in enumerate(windows.to(model.device).split(batch)):
        router.begin(model, tokens)
        started = time.perf_counter()
        walk = RoutedPass(model, tokens, context=context, memory=memories[index] if memories else None)
        actions = []
        while not walk.done:
            actions.append(router(walk.hidden, walk.layer, walk.compute))
            walk.step(actions[-1])
        loss = walk.losses().cpu()  # waits for an accelerator, so the clock is right
        seconds = torch.tensor([(time.perf_counter() - started) / loss.numel()])
        parts.append((loss, walk.compute.cpu(), torch.stack(actions, dim=-1).cpu(), seconds))
    return Measurement(*(torch.cat(column) for column in zip(*parts, strict=True)))


def evaluate(
    model: DuoForCausalLM, router: Router, windows: Tensor, *, price: float, reference: str = "small"
) -> dict[str, float]:
    """A router's mean loss, gain, compute and return on some windows, in the routed context.

    Args:
        model: a duo model.
        router: decides.
        windows: (W, T+1).
        price: nats per all-big pass.
        reference: the action of the reference route, whose loss gains are measured against.
    """
    measured, cheap = measure(model, router, windows), measure(model, ConstantRouter(reference), windows)
    gain, compute = (cheap.loss - measured.loss).mean().item(), measured.compute.mean().item()
    return {"loss": measured.loss.mean().item(), "gain": gain, "compute": compute, "return": gain - price * compute}


@dataclass
class Comparison:
    """Routers side by side.

    Attributes:
        settings: model, corpus, price, token counts, command: what a reader needs to repeat it.
        rows: one per router; see docs/metrics.md for every key.
        frontiers: loss against compute of the best fixed pattern and of the oracle, per number of big layers.
    """

    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    frontiers: dict[str, list[dict[str, Any]]]

    @classmethod
    def load(cls, path: Path) -> Comparison:
        """A saved `comparison.json`."""
        return cls(**json.loads(path.read_text()))

    def save(self, folder: Path) -> None:
        """Write `comparison.json` and `comparison.csv` (one line per router, nested keys joined by a dot)."""
        (folder / "comparison.json").write_text(json.dumps(asdict(self), indent=1))
        flat = [dict(flatten(row)) for row in self.rows]
        names = list(dict.fromkeys(name for row in flat for name in row))
        with open(folder / "comparison.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(flat)


def flatten(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of a nested dictionary with their dotted names; intervals become `.low` and `.high`."""
    for key, value in row.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        elif (key.endswith("_interval") or prefix.endswith("_interval.")) and isinstance(value, (list, tuple)):
            yield from ((f"{prefix}{key}.{end}", bound) for end, bound in zip(("low", "high"), value, strict=True))
        else:
            yield f"{prefix}{key}", value


def check_searches(model: DuoForCausalLM, length: int, actions: Sequence[str], *counts: int) -> None:
    """Refuse exhaustive searches of so many windows that would exceed the oracle's memory limit.

    Raises:
        ValueError: too many routes, or too much memory; says how much.
    """
    routes = count_routes(model.num_layers, actions)
    for count in counts:
        states_within(MEMORY_LIMIT, model, count, length, routes)


class Comparer:
    """Measures routers on the same windows, paired with the best fixed pattern.

    Args:
        model: a frozen duo model.
        training: (W, T+1) of the router split, on which the fixed patterns are enumerated.
        held_out: (W, T+1) of the evaluation split.
        price: nats per all-big pass.
        actions: the allowed actions' names.
        reference: the action of the reference route, whose loss gains are measured against.
        options: see `EvaluationOptions`.

    Attributes:
        fixed: the best fixed pattern, with which differences are paired.
        oracle: the exhaustive oracle, on the first `options.reference_windows` windows.
        knowable: a large network on a router's inputs. What it regrets only the label could have told; what others
            regret beyond it they could have known. An estimate: a larger one, or more text, might know more.
    """

    def __init__(
        self,
        model: DuoForCausalLM,
        training: Tensor,
        held_out: Tensor,
        *,
        price: float,
        actions: Sequence[str],
        reference: str,
        options: EvaluationOptions,
    ):
        self.model, self.price, self.options = model, price, options
        self.windows = held_out[: options.windows]
        self.searched = held_out[: options.reference_windows]
        enumerated = training[: options.fixed_windows].to(model.device)
        self._patterns = exhaustive(model, enumerated, context="uniform", actions=actions)
        self._final = training[: options.final_windows]
        self.fixed = self._best_fixed(self._patterns.fixed_ranking(price), price)
        self.oracle = OracleRouter(price, actions)
        self.oracle.begin(model, self.searched.to(model.device))
        self._memory = remember(model, self.searched.to(model.device))
        cheap = ConstantRouter(reference)
        self._cheap = measure(model, cheap, self.windows, batch=options.batch)
        self._cheap_reference = self._measure_reference(cheap)
        self.knowable: Router | None = None
        self._knowable_returns: Tensor | None = None
        self._traced: dict[str, dict[str, Any]] = {}
        self._fixed = measure(model, self.fixed, self.windows, batch=options.batch)

    def _best_fixed(self, ranking: Tensor, price: float) -> PatternRouter:
        """The finalist with the lowest cost: 256 candidates on few windows alone would crown a lucky one."""
        finalists = [
            PatternRouter(self._patterns.routes[index].tolist()) for index in ranking[: self.options.finalists]
        ]
        if len(finalists) == 1:
            return finalists[0]

        def cost(pattern: PatternRouter) -> float:
            measured = measure(self.model, pattern, self._final, batch=self.options.batch)
            return (measured.loss + price * measured.compute).mean().item()

        return min(finalists, key=cost)

    def best_patterns(self) -> list[PatternRouter]:
        """The best pattern per number of big layers, chosen on router text in two rounds, as `fixed` is."""
        table, patterns = self._patterns, []
        for count in sorted(set((table.routes == BIG).sum(1).tolist())):
            allowed = table.with_big(count)
            patterns.append(self._best_fixed(table.fixed_ranking(allowed=allowed)[: int(allowed.sum())], price=0.0))
        return patterns

    def compare(self, routers: Mapping[str, Sequence[Router]], settings: dict[str, Any]) -> Comparison:
        """A row per name, for a router or one per training seed, and the two frontiers."""
        rows = [self.row(name, seeds) for name, seeds in routers.items()]
        return Comparison(settings, rows, {"fixed": self.fixed_frontier(), "oracle": self.oracle_frontier()})

    def row(self, name: str, seeds: Sequence[Router]) -> dict[str, Any]:
        """Measure a router, trained with one seed or several.

        The oracle, which is searched, sees fewer windows. See docs/metrics.md for the keys.
        """
        sees_label = isinstance(seeds[0], OracleRouter)
        windows = self.searched if sees_label else self.windows
        batch = len(windows) if sees_label else self.options.batch
        measured = _stacked([measure(self.model, router, windows, batch=batch) for router in seeds])
        self._traced[name] = self._trace(measured.routes[0])
        return {
            "router": name,
            "context": "routed",
            "sees_label": sees_label,
            "seeds": len(seeds),
            "tokens": measured.loss[0].numel(),
            **self._deployed(measured),
            **self._against_fixed(measured),
            **self._reference(_stacked([self._measure_reference(router) for router in seeds])),
        }

    def traces(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """What the report shows beside the numbers: routes of all compared routers, and the first windows' difficulty.

        Returns:
            `routers`: per router `share_of_big` (L, T), `per_layer` by action (L,), and the `routes` (L, T) of the
            first window, whose tokens are `tokens`; `difficulty`: rows of `token_difficulty`, of the first windows.
        """
        shown = self.searched[:_SHOWN_WINDOWS]
        table = replace(self.oracle.table, losses=self.oracle.table.losses[: len(shown)])
        known = {int(code) for code in table.routes.unique()}
        rows = token_difficulty(table, shown, tokenizer) if {SMALL, BIG} <= known else []
        return {
            "tokens": token_names(shown[0, 1:], tokenizer),
            "difficulty": [row._asdict() for row in rows],
            "routers": self._traced,
        }

    def _trace(self, routes: Tensor) -> dict[str, Any]:
        """Routes (W, T, L) in short."""
        per_layer = {name: (routes == code).float().mean((0, 1)).tolist() for code, name in enumerate(ACTIONS)}
        big = (routes == BIG).float().mean(0).T.tolist()
        return {"share_of_big": big, "per_layer": per_layer, "routes": routes[0].T.tolist()}

    def _measure_reference(self, router: Router) -> Measurement:
        size = len(self.searched)
        return measure(self.model, router, self.searched, context="reference", batch=size, memories=[self._memory])

    def _interval(self, values: Tensor, statistic: Callable[[np.ndarray], np.ndarray] | None = None):
        return bootstrap_interval(values, resamples=self.options.resamples, statistic=statistic)

    def _returns(self, measured: Measurement, cheap: Measurement) -> Tensor:
        """(W,), or (S, W) for several seeds: mean return per window."""
        gain = cheap.loss[: measured.loss.shape[-2]] - measured.loss
        return (gain - self.price * measured.compute).mean(-1)

    def _deployed(self, measured: Measurement) -> dict[str, Any]:
        loss, compute = measured.loss.mean(-1), measured.compute.mean(-1)
        returns = self._returns(measured, self._cheap)
        length = measured.loss.shape[-1]
        flops = self.model.flops.token(compute, (length + 1) / 2)
        shares = {name: (measured.routes == code).float().mean((-2, -1)) for code, name in enumerate(ACTIONS)}
        seconds = measured.seconds.flatten()
        return {
            "loss": loss.mean().item(),
            "loss_interval": self._interval(loss),
            "perplexity": loss.mean().exp().item(),
            "perplexity_interval": self._interval(loss, np.exp),
            "compute": compute.mean().item(),
            "compute_interval": self._interval(compute),
            "flops_per_token": flops.mean().item(),
            "flops_per_token_interval": self._interval(flops),
            "return": returns.mean().item(),
            "return_interval": self._interval(returns),
            "actions": {name: share.mean().item() for name, share in shares.items()},
            "actions_interval": {name: self._interval(share) for name, share in shares.items()},
            "tokens_per_second": 1 / seconds.mean().item(),
            "tokens_per_second_interval": self._interval(seconds, lambda mean: 1 / mean),
        }

    def _against_fixed(self, measured: Measurement) -> dict[str, Any]:
        count = measured.loss.shape[-2]
        returns = self._returns(measured, self._cheap) - self._returns(self._fixed, self._cheap)[:count]
        losses = measured.loss.mean(-1) - self._fixed.loss[:count].mean(-1)
        return {
            "return_minus_fixed": returns.mean().item(),
            "return_minus_fixed_interval": self._interval(returns),
            "return_minus_fixed_p": sign_flip_test(returns),
            "loss_minus_fixed": losses.mean().item(),
            "loss_minus_fixed_interval": self._interval(losses),
        }

    def _reference(self, measured: Measurement) -> dict[str, Any]:
        table = self.oracle.table
        best = table.best(self.price)
        loss, compute = table.loss(best).cpu(), table.compute[best].cpu()
        gain = self._cheap_reference.loss - loss
        returns = self._returns(measured, self._cheap_reference)
        regret = (gain - self.price * compute).mean(-1) - returns
        agreement = (measured.routes == self.oracle.routes.cpu()).float().mean((-2, -1))
        return {
            "regret": regret.mean().item(),
            "regret_interval": self._interval(regret),
            **self._avoidable(returns),
            "agreement": agreement.mean().item(),
            "agreement_interval": self._interval(agreement),
            "reference": {
                "context": "reference",
                "tokens": measured.loss[0].numel(),
                "loss": measured.loss.mean().item(),
                "loss_interval": self._interval(measured.loss.mean(-1)),
                "compute": measured.compute.mean().item(),
            },
        }

    def _avoidable(self, returns: Tensor) -> dict[str, Any]:
        """The part of the regret that a router could have avoided, by the estimate of `knowable`."""
        if self.knowable is None:
            return {}
        if self._knowable_returns is None:
            self._knowable_returns = self._returns(self._measure_reference(self.knowable), self._cheap_reference)
        avoidable = self._knowable_returns - returns
        return {
            "regret_avoidable": avoidable.mean().item(),
            "regret_avoidable_interval": self._interval(avoidable),
        }

    def oracle_frontier(self) -> list[dict[str, Any]]:
        """The oracle's loss in the reference context with exactly k big layers, per possible k."""
        rows = self.oracle.table.by_budget()
        return [{"context": "reference", **{key: row[key] for key in ("big", "loss", "compute")}} for row in rows]

    def fixed_frontier(self) -> list[dict[str, Any]]:
        """The best fixed pattern's loss in the routed context per number of big layers, chosen on router text."""
        table, points = self._patterns, []
        for count in sorted(set((table.routes == BIG).sum(1).tolist())):
            route = table.routes[table.best_fixed(allowed=table.with_big(count))].tolist()
            measured = measure(self.model, PatternRouter(route), self.windows, batch=self.options.batch)
            loss, compute = measured.loss.mean().item(), measured.compute.mean().item()
            points.append({"big": count, "context": "routed", "route": route, "loss": loss, "compute": compute})
        return points
