"""The comparison of routers, with intervals, over measurements, a baseline and a bound.

Losses, compute, returns and top-1 agreement are those of the *routed* context, which is deployment. Regret and
agreement with the bound are measured in the *reference* context, where the oracle is exact, on fewer tokens. So is the
whole row of the bound. Every row says which is which.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from duorl.costs import ACTIONS, BIG
from duorl.evaluation.baseline import Baseline
from duorl.evaluation.bound import find_bound
from duorl.evaluation.choice import choose
from duorl.evaluation.difficulty import named_rows, token_names
from duorl.evaluation.flat import flatten
from duorl.evaluation.frontier import Frontier, Ladder
from duorl.evaluation.measure import Measurement, measure, stacked, top1_agreement
from duorl.evaluation.options import EvaluationOptions
from duorl.evaluation.statistics import Estimate, as_share, estimate, holm, named
from duorl.files import write_json, writing
from duorl.models.attention import Memory
from duorl.models.modeling import DuoForCausalLM
from duorl.oracle.patterns import window_losses
from duorl.routed_pass import Context, remember
from duorl.routers import ConstantRouter, OracleRouter, PatternRouter, ReplayRouter, Router

_SHOWN_WINDOWS = 2
_AGAINST_FIXED = ("return_minus_fixed", "loss_minus_fixed")
_AGAINST_MIX = "loss_minus_mix"


@dataclass
class Comparison:
    """Routers side by side.

    Attributes:
        settings: model, corpus, price, numbers of tokens, command.
        rows: one per router; see docs/reference/metrics.md for every key.
        frontiers: loss against compute of the best fixed pattern and of the oracle, per number of big layers. Without
            an exact oracle, the oracle's frontier is empty.
    """

    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    frontiers: dict[str, list[dict[str, Any]]]

    @classmethod
    def load(cls, path: Path) -> Comparison:
        """Load a `comparison.json`."""
        return cls(**json.loads(path.read_text()))

    def save(self, folder: Path) -> None:
        """Write `comparison.json` and `comparison.csv` (one line per router, nested keys joined by a dot)."""
        write_json(folder / "comparison.json", asdict(self))
        flat = [dict(flatten(row)) for row in self.rows]
        names = list(dict.fromkeys(name for row in flat for name in row))
        with writing(folder / "comparison.csv") as beside, open(beside, "w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(flat)


class Comparer:
    """Measures routers on the same windows, paired with the best fixed pattern.

    Args:
        model: a frozen duo model.
        training: (W, T+1) of the router split, on which the fixed patterns are chosen.
        held_out: (W, T+1) of the evaluation split.
        files: (W,), file of each of these windows; by default each window is its own file.
        price: nats per all-big pass.
        actions: names of the allowed actions.
        reference: the action of the reference route, in every layer.
        options: see `EvaluationOptions`.
        baseline: the fixed patterns, if they are ranked already, as `choice` says.

    Attributes:
        choice: the chosen searches; `choose` with the same arguments returns the same.
        baseline: the fixed patterns.
        fixed: the best fixed pattern; differences are paired with it.
        bound: the bound of routers, on the first `choice.options.reference_windows` windows; or None.
        knowable: a large network on the same inputs as the routers. Its regret is an estimate of the regret that no
            router can avoid, because only the label could avoid it. A larger network or more text may lower it.
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
        files: Tensor | None = None,
        baseline: Baseline | None = None,
    ):
        self.model, self.price, self.actions = model, price, tuple(actions)
        self.choice = choose(model, training, held_out, actions=actions, options=options)
        self.options = sizes = self.choice.options
        self.windows = held_out[: sizes.windows]
        self.searched = held_out[: sizes.reference_windows]
        self.files = torch.arange(len(held_out)) if files is None else files
        self.baseline = baseline or Baseline.search(
            model, training, method=self.choice.baseline, actions=actions, price=price, options=sizes
        )
        self.fixed = PatternRouter(self.baseline.at_price(price))
        searched = self.searched.to(model.device)
        self.bound = find_bound(
            self.choice.bound,
            model,
            searched,
            price=price,
            actions=actions,
            starts=self.baseline.starts(price),
            shown=_SHOWN_WINDOWS,
        )
        self._route = ConstantRouter(reference)
        self._known: dict[tuple[str, Context], Measurement] = {}
        self.knowable: Router | None = None
        self._knowable_returns: Tensor | None = None
        self._traced: dict[str, dict[str, Any]] = {}
        self._all_big = measure(model, ConstantRouter("big"), self.windows, batch=sizes.batch).predicted

    @cached_property
    def _memory(self) -> Memory:
        """For the reference context on the searched windows."""
        return remember(self.model, self.searched.to(self.model.device))

    def _baseline_in(self, name: str, context: Context) -> Measurement:
        """The reference route (`gain`), or the best fixed pattern (`fixed`), measured once in each context."""
        if (name, context) not in self._known:
            router = {"gain": self._route, "fixed": self.fixed}[name]
            self._known[name, context] = self._measure(router, context)
        return self._known[name, context]

    def _measure(self, router: Router, context: Context) -> Measurement:
        """Measure a router: on all windows, or in the reference context on the searched ones."""
        if context == "routed":
            return measure(self.model, router, self.windows, batch=self.options.batch)
        size = len(self.searched)
        return measure(self.model, router, self.searched, context=context, batch=size, memories=[self._memory])

    @cached_property
    def fixed_patterns(self) -> Frontier:
        """What mixtures of the fixed patterns reach on the windows; their losses on router text decide which two."""
        routes = torch.tensor(list(self.baseline.per_big().values()), device=self.model.device)
        losses = window_losses(self.model, self.windows, routes, batch=self.options.batch)
        known = self.baseline.final_losses(routes)[:, None]
        spent = self.model.route_compute(routes).double().cpu()[:, None]
        chosen = Ladder(spent, known)
        return Frontier([Ladder(spent.expand_as(losses), losses, chosen=chosen)], self.files[: len(self.windows)])

    @property
    def bounds(self) -> dict[str, list[Router]]:
        """The router of the bound for `compare`, by its name; empty without a bound."""
        return {self.bound.name: [self.bound.router]} if self.bound else {}

    def compare(
        self,
        routers: Mapping[str, Sequence[Router]],
        settings: dict[str, Any],
        progress: Callable[[str], None] = lambda note: None,
    ) -> Comparison:
        """Compare routers: one row per name, and the two frontiers.

        Args:
            routers: by name, one router per training seed.
            settings: see `Comparison`.
            progress: called with the name of the next router.
        """
        rows = []
        for number, (name, seeds) in enumerate(routers.items(), 1):
            progress(f"measure {name}, {number} of {len(routers)}")
            rows.append(self.row(name, seeds))
        rivals = [row for row, seeds in zip(rows, routers.values(), strict=True) if seeds[0] is not self.fixed]
        for key in (*_AGAINST_FIXED, _AGAINST_MIX):
            known = [row for row in rivals if row[key] is not None]
            for row, holds in zip(known, holm([row[f"{key}_p"] for row in known]), strict=True):
                row[f"{key}_holds"] = holds
        progress("measure the frontiers")
        return Comparison(
            {**settings, "rival": self.choice.rival},
            rows,
            {"fixed": self.fixed_frontier(), "oracle": self.oracle_frontier()},
        )

    def row(self, name: str, seeds: Sequence[Router]) -> dict[str, Any]:
        """Measure a router, trained with one seed or several.

        The bound is measured on its searched windows and in the reference context, in which it was searched, and so is
        the fixed pattern beside it. See docs/reference/metrics.md for the keys.
        """
        sees_label = isinstance(seeds[0], (OracleRouter, ReplayRouter))
        context: Context = "reference" if sees_label else "routed"
        measured = stacked([self._measure(router, context) for router in seeds])
        self._traced[name] = self._trace(measured.routes[0])
        return {
            "router": name,
            "context": context,
            "sees_label": sees_label,
            "seeds": len(seeds),
            "tokens": measured.loss[0].numel(),
            "bound": self.bound.kind if self.bound else None,
            **self._measured(measured, context, torch.tensor([router.flops() for router in seeds])),
            **self._against_fixed(measured, context),
            **self._against_mix(None if sees_label else measured),
            **self._reference(seeds),
        }

    def traces(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Data for the charts of the report: routes of all compared routers, and difficulty of the first windows.

        Returns:
            `routers`: per router `share_of_big` (L, T), `per_layer` by action (L,), and the `routes` (L, T) of the
            first window, whose tokens are `tokens`; `difficulty`: `named_rows` of the first windows; `bound`: the kind
            of bound that they are of, or None.
        """
        shown = self.windows[:_SHOWN_WINDOWS]
        both = {"small", "big"} <= set(self.actions)
        rows = self.bound.difficulty(self.model, tokenizer) if self.bound and both else []
        return {
            "tokens": token_names(shown[0, 1:], tokenizer),
            "bound": self.bound.kind if self.bound else None,
            "difficulty": named_rows(rows, exact=self.bound is not None and self.bound.exact),
            "routers": self._traced,
        }

    def _trace(self, routes: Tensor) -> dict[str, Any]:
        """Summary of routes (W, T, L)."""
        per_layer = {name: (routes == code).float().mean((0, 1)).tolist() for code, name in enumerate(ACTIONS)}
        big = (routes == BIG).float().mean(0).T.tolist()
        return {"share_of_big": big, "per_layer": per_layer, "routes": routes[0].T.tolist()}

    def _estimated(self, values: Tensor, name: str, scale: Callable[[float], float] = float) -> dict[str, Any]:
        """A mean over windows, (W,) or (S, W), with its interval."""
        return named(name, estimate(values, self.files[: values.shape[-1]]), scale)

    def _returns(self, measured: Measurement, context: Context) -> Tensor:
        """Mean return of each window, (W,), or (S, W) for several seeds."""
        gain = self._baseline_in("gain", context).loss - measured.loss
        return (gain - self.price * measured.compute).mean(-1)

    def _measured(self, measured: Measurement, context: Context, own_flops: Tensor) -> dict[str, Any]:
        """Losses, compute, FLOPs and time; the FLOPs are those of all parts, and of the routers themselves, (S,)."""
        loss, compute = measured.loss.mean(-1), measured.compute.mean(-1)
        returns = self._returns(measured, context)
        length = measured.loss.shape[-1]
        flops = self.model.flops.token(compute, (length + 1) / 2) + own_flops[:, None]
        agreement = top1_agreement(measured.predicted, self._all_big[: loss.shape[-1]])
        shares = {name: (measured.routes == code).float().mean((-2, -1)) for code, name in enumerate(ACTIONS)}
        # Measured per batch, and positive: the interval is computed on the logarithm.
        seconds = estimate(measured.seconds.reshape(1, 1, -1), statistic=lambda mean: -math.log(mean[0]))
        return {
            **self._estimated(loss, "loss"),
            **named("perplexity", estimate(loss, self.files[: loss.shape[-1]]), math.exp),
            **self._estimated(compute, "compute", as_share),
            **self._estimated(flops, "flops_per_token"),
            **self._estimated(agreement, "top1_agreement", as_share),
            **self._estimated(returns, "return"),
            "actions": {name: share.mean().item() for name, share in shares.items()},
            "actions_interval": {
                name: self._estimated(share, name, as_share)[f"{name}_interval"] for name, share in shares.items()
            },
            **named("tokens_per_second", seconds, math.exp),
        }

    def _against_fixed(self, measured: Measurement, context: Context) -> dict[str, Any]:
        fixed = self._baseline_in("fixed", context)
        differences = {
            "return": self._returns(measured, context) - self._returns(fixed, context),
            "loss": (measured.loss - fixed.loss).mean(-1),
        }
        row: dict[str, Any] = {}
        for key, values in zip(_AGAINST_FIXED, differences.values(), strict=True):
            row |= _tested(key, estimate(values, self.files[: values.shape[-1]]))
        return row

    def _against_mix(self, measured: Measurement | None) -> dict[str, Any]:
        """The loss minus that of the best mixture of fixed patterns at the same compute: the rival that is a coin."""
        if measured is None:
            return _tested(_AGAINST_MIX, None)
        loss, spent = measured.loss.mean(-1).double(), measured.compute.mean(-1).double()
        return _tested(_AGAINST_MIX, self.fixed_patterns.excess(loss, spent))

    def _reference(self, seeds: Sequence[Router]) -> dict[str, Any]:
        """Comparison with the bound, in the reference context; null without a bound."""
        if self.bound is None:
            names = ("regret", "regret_interval", "agreement", "agreement_interval", "reference")
            return dict.fromkeys(names)
        measured = stacked([self._measure(router, "reference") for router in seeds])
        gain = self._baseline_in("gain", "reference").loss - self.bound.losses
        returns = self._returns(measured, "reference")
        regret = (gain - self.price * self.bound.compute).mean(-1) - returns
        agreement = (measured.routes == self.bound.routes).float().mean((-2, -1))
        return {
            **self._estimated(regret, "regret"),
            **self._avoidable(returns),
            **self._estimated(agreement, "agreement", as_share),
            "reference": {
                "context": "reference",
                "tokens": measured.loss[0].numel(),
                **self._estimated(measured.loss.mean(-1), "loss"),
                "compute": measured.compute.mean().item(),
            },
        }

    def _avoidable(self, returns: Tensor) -> dict[str, Any]:
        """Estimate of the avoidable part of the regret; see `knowable`."""
        if self.knowable is None:
            return {}
        if self._knowable_returns is None:
            self._knowable_returns = self._returns(self._measure(self.knowable, "reference"), "reference")
        return self._estimated(self._knowable_returns - returns, "regret_avoidable")

    def oracle_frontier(self) -> list[dict[str, Any]]:
        """The oracle's loss in the reference context with exactly k big layers, for each k; empty without it."""
        return [{"context": "reference", **row} for row in self.bound.frontier] if self.bound else []

    def fixed_frontier(self) -> list[dict[str, Any]]:
        """The best fixed pattern's loss in the routed context per number of big layers, chosen on router text."""
        found = self.baseline.per_big()
        (ladder,) = self.fixed_patterns.seeds
        columns = zip(found.items(), ladder.loss.tolist(), ladder.compute.tolist(), strict=True)
        return [
            {"big": big, "context": "routed", "route": route, "loss": loss, "compute": compute}
            for (big, route), loss, compute in columns
        ]


def _tested(key: str, found: Estimate | None) -> dict[str, Any]:
    """A difference with its interval and p; whether it holds is known when all rows are measured."""
    return {**named(key, found), f"{key}_p": None if found is None else found.p, f"{key}_holds": False}
