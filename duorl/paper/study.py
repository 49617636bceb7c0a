"""Measures the numbers of every figure of the paper, without pictures.

The paper's model has 12 layers, and its budgets are 4, 6 and 8 big layers. Here there are L layers, and the budgets are
a third, a half and two thirds of L. Oracle and learned routers are compared in the `reference` context, on the same
tokens, unless a number says `routed`. The paper does not name its context. Patterns and routers are from the router
split, all numbers from the evaluation split.

Where the routes of a model are too many to enumerate, a search takes the oracle's place. It is named a lower bound of
the oracle's return in every figure, and the oracle in the routed context is left out (Fig. 4b).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from duorl.corpus import Windows
from duorl.costs import ACTIONS, BIG, action_ids
from duorl.evaluation.baseline import Baseline
from duorl.evaluation.difficulty import token_names
from duorl.evaluation.frontier import best_at
from duorl.evaluation.measure import Measurement, measure
from duorl.evaluation.options import EvaluationOptions
from duorl.evaluation.statistics import Statistic, estimate
from duorl.models import DuoForCausalLM
from duorl.oracle import all_routes, descent, exhaustive
from duorl.oracle.search import MOST_ROUTES
from duorl.paper.measures import LOWER_BOUND, early_exits, lateness, on_cpu, quarters, rank_correlation, top_overlap
from duorl.paper.searches import Exhaustive, Search, Searched
from duorl.paper.size import StudySize
from duorl.paper.wanted import Wanted
from duorl.routed_pass import remember
from duorl.routers import PatternRouter, Router

Numbers = dict[str, Any]
_BATCH = 16
_SHOWN_TOKENS = 48
_SMALL_PRICE = 0.01  # so that of routes with the same loss the cheaper one is shown


class _Measured(NamedTuple):
    """One point of a curve: mean number of big layers, mean compute, and mean loss of each window, (W,)."""

    big: float
    compute: float
    loss: Tensor


class Study:
    """Measures the figures of one duo model.

    Args:
        model: a frozen duo model.
        tokenizer: its tokenizer.
        training: (W, T+1) of the router split, all texts together, for the choice of patterns and the training.
        texts: evaluation windows by the text's name.
        learners: names of DuoRL's learners.
        router: gives a trained router; see `wanted`.
        size: see `StudySize`.
        seed: seed of all random generators.
        exact: all routes are enumerated; false: they are searched.
        progress: called with the next step.
    """

    def __init__(
        self,
        model: DuoForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        training: Tensor,
        texts: Mapping[str, Windows],
        *,
        learners: Sequence[str],
        router: Callable[[Wanted], Router],
        size: StudySize,
        seed: int,
        exact: bool = True,
        progress: Callable[[str], None] = lambda note: None,
    ):
        self.model, self.tokenizer, self.training = model, tokenizer, training
        self.texts = {name: windows.tokens[: size.windows] for name, windows in texts.items()}
        self.files = {name: windows.files[: size.windows] for name, windows in texts.items()}
        self.learners, self.router, self.size, self.seed = learners, router, size, seed
        self._routers: dict[Wanted, Router] = {}
        self.exact, self.progress = exact, progress
        self.depth = model.num_layers
        self._oracle = "oracle" if exact else LOWER_BOUND

    def run(self) -> dict[str, Numbers]:
        """The numbers of all figures except the 8th (`duorl.paper.dense`), by the figure's name: `2a`, ..., `7`."""
        figures: dict[str, Numbers] = {}
        for letter, big in zip("abc", self.budgets, strict=True):
            self.progress(f"heat maps, {big} of {self.depth} big")
            best = {name: search.routes(big) for name, search in self.searches.items()}
            figures[f"2{letter}"] = self._heat_maps(self._oracle, big, best)
            figures[f"3{letter}"] = self._heat_maps("soft router", big, self._router_routes(self._soft(big)))
        figures |= self._with_skip()
        for name, make in (
            ("4a", self.random_patterns),
            ("4b", self.curves),
            ("4c", self.schedules),
            ("5", self.difficulty),
            ("6", self.coloured_text),
            ("7", self.single_routes),
        ):
            self.progress(f"figure {name}")
            figures[name] = make()
        bound = "exact" if self.exact else "lower bound"
        return {name: {**numbers, "bound": bound} for name, numbers in sorted(figures.items())}

    def wanted(self) -> list[Wanted]:
        """All routers that `run` will ask for, so that they can be trained before, and side by side."""
        soft = [Wanted(None, self._soft_compute(big)) for big in self._soft_budgets]
        skips = "skip", "big"
        learned = [Wanted(name, price) for name in self.learners for price in self.size.prices]
        return [*soft, Wanted(None, self._soft_compute(self.budgets[1], skips), skips), *learned]

    @cached_property
    def budgets(self) -> list[int]:
        """A third, a half and two thirds of the layers: the paper's 4, 6 and 8 of 12."""
        return [max(1, round(self.depth * share)) for share in (1 / 3, 1 / 2, 2 / 3)]

    @cached_property
    def searches(self) -> dict[str, Search]:
        """The best routes with small and big for each number of big layers, in the reference context."""
        return {name: self._search(windows, ("small", "big"), self.budgets) for name, windows in self.texts.items()}

    def _search(self, windows: Tensor, actions: Sequence[str], bases: Sequence[int]) -> Search:
        if self.exact:
            return Exhaustive(self.model, windows, actions)
        low = int(action_ids(actions)[0])
        patterns = {big: [a if a == BIG else low for a in route] for big, route in self.patterns.items()}
        return Searched(self.model, windows, patterns, bases, actions, _BATCH)

    @cached_property
    def patterns(self) -> dict[int, list[int]]:
        """The best fixed pattern for each number of big layers, chosen on the router split in two rounds."""
        rounds = EvaluationOptions(fixed_windows=self.size.pattern_windows, final_windows=self.size.final_windows)
        more: dict[str, Any] = {"actions": ("small", "big"), "price": 0.0, "options": rounds}
        more["method"] = "enumeration" if self.exact else "greedy"
        return Baseline.search(self.model, self.training, **more).per_big()

    # Figures 2 and 3

    def _router_routes(self, router: Router) -> dict[str, Tensor]:
        return {name: self._in_reference(router, name).routes for name in self.texts}

    def _heat_maps(self, router: str, big: int, routes: Mapping[str, Tensor]) -> Numbers:
        """Share of big per layer and position, and the mean places of big in depth and in the sequence."""
        texts = {}
        for name, found in routes.items():
            chosen = (found == BIG).float()  # (W, T, L)
            texts[name] = {
                "share_of_big": chosen.mean(0).T.tolist(),
                "per_layer": self._with_interval(name, chosen.mean(1)),
                "mean_share": self._with_interval(name, chosen.mean((1, 2))),
                "lateness": self._with_interval(name, lateness(chosen)),
                "early_tokens": self._with_interval(name, quarters(chosen)),
            }
        return {"router": router, "context": "reference", "big": big, "layers": self.depth, "texts": texts}

    def _with_skip(self) -> dict[str, Numbers]:
        """Big or skip with half of the layers skipped (Fig. 2d, 3d)."""
        big = self.budgets[1]
        self.progress("heat maps, big or skip")
        actions, routes = ("skip", "big"), {}
        for name, windows in self.texts.items():
            routes[name] = self._search(windows, actions, [big]).routes(big)
        oracle = self._heat_maps(f"{self._oracle}, big or skip", big, routes)
        for name, found in routes.items():
            exits = early_exits(found).float().mean(1)
            skipped = (found != BIG).float().mean(1)
            oracle["texts"][name]["early_exits"] = self._with_interval(name, exits)
            oracle["texts"][name]["most_skipped"] = self._with_interval(name, skipped, statistic=np.max)
        learned = self._router_routes(self._soft(big, actions=actions))
        return {"2d": oracle, "3d": self._heat_maps("soft router, big or skip", big, learned)}

    # Figure 4

    def random_patterns(self) -> Numbers:
        """Random patterns (each for all tokens) with half of the layers big, and the oracle (Fig. 4a)."""
        big, generator = self.budgets[1], torch.Generator().manual_seed(self.seed)
        texts = {}
        for name, search in self.searches.items():
            patterns = search.of_patterns(search.draw(big, self.size.random_patterns, generator))  # (W, patterns)
            fixed = search.of_patterns(torch.tensor([self.patterns[big]]))[:, 0]
            oracle = search.losses(big).mean(1)
            soft = self._in_reference(self._soft(big), name)
            texts[name] = {
                "patterns": patterns.mean(0).tolist(),
                "best_random": self._with_interval(name, patterns, statistic=np.min),
                "best_fixed": self._with_interval(name, fixed),
                "oracle": self._with_interval(name, oracle),
                "soft": self._with_interval(name, soft.loss.mean(1)),
                "soft_compute": soft.compute.mean().item(),
                "best_random_minus_oracle": self._with_interval(name, patterns - oracle[:, None], statistic=np.min),
                "fixed_minus_oracle": self._with_interval(name, fixed - oracle),
                "soft_minus_fixed": self._against_fixed(name, soft),
            }
        return {"context": "reference", "big": big, "layers": self.depth, "texts": texts}

    def _against_fixed(self, name: str, measured: Measurement) -> Numbers:
        """Loss minus that of the fixed patterns at the same compute: of the best mixture of two of them."""
        routes = torch.tensor([self.patterns[big] for big in sorted(self.patterns)])
        losses, compute = self.searches[name].of_patterns(routes), self._compute(routes).numpy()  # (W, L + 1), (L + 1,)
        columns = torch.cat([measured.loss.mean(1)[:, None], measured.compute.mean(1)[:, None], losses], 1)
        return self._with_interval(
            name, columns, statistic=lambda means: means[0] - best_at(compute, means[2:], means[1])
        )

    def curves(self) -> Numbers:
        """Loss against the number of big layers: oracle, fixed patterns, soft router, DuoRL's agents (Fig. 4b)."""
        routers = {"soft": [self._soft(big) for big in self._soft_budgets]}
        for learner in self.learners:
            routers[learner] = [self._made(Wanted(learner, price)) for price in self.size.prices]
        texts: dict[str, Numbers] = {}
        for name, windows in self.texts.items():
            texts[name] = {"tokens": windows[:, 1:].numel(), "files": self.files[name].tolist()}
            for context, all_big, curves in (
                ("reference", self._all_big(name), self._oracle_and_fixed(name)),
                ("routed", self._all_big(name), self._routed_oracle_and_fixed(name)),
            ):
                run = self._in_reference if context == "reference" else self._routed
                curves |= {kind: [self._measured(run(one, name)) for one in found] for kind, found in routers.items()}
                texts[name][context] = {
                    kind: [self._point(name, point, all_big) for point in points] for kind, points in curves.items()
                }
        return {"layers": self.depth, "prices": list(self.size.prices), "texts": texts}

    @property
    def _soft_budgets(self) -> list[int]:
        more = range(1, self.depth) if self.size.big is None else [big for big in self.size.big if big <= self.depth]
        return sorted({*self.budgets, *more})

    def _all_big(self, name: str) -> Tensor:
        """Losses of all-big, (W,); they are the same in both contexts."""
        return self.searches[name].losses(self.depth).mean(1)

    def _oracle_and_fixed(self, name: str) -> dict[str, list[_Measured]]:
        search, budgets = self.searches[name], sorted(self.patterns)
        routes = torch.tensor([self.patterns[big] for big in budgets])
        fixed, compute = search.of_patterns(routes), self._compute(routes)
        return {
            "oracle": [self._chosen(big, search.routes(big), search.losses(big)) for big in budgets],
            "fixed": [_Measured(*point) for point in zip(budgets, compute.tolist(), fixed.T, strict=True)],
        }

    def _routed_oracle_and_fixed(self, name: str) -> dict[str, list[_Measured]]:
        """The oracle in the routed context, for the paper's budgets and for one big layer; all fixed patterns."""
        patterns = [route for _, route in sorted(self.patterns.items())]
        fixed = {"fixed": [self._measured(self._routed(PatternRouter(route), name)) for route in patterns]}
        return {"oracle": self._routed_oracle(name), **fixed} if self.exact else fixed

    def _routed_oracle(self, name: str) -> list[_Measured]:
        found = []
        for big in sorted({1, *self.budgets}):
            allowed = all_routes(self.depth, ("small", "big")).to(self.model.device)
            allowed = (allowed == BIG).sum(1) == big
            table = on_cpu(exhaustive(self.model, self.texts[name], context="routed", allowed=allowed))
            assert table.committed is not None
            found.append(self._chosen(big, table.routes[table.committed], table.loss(table.committed)))
        return found

    def _chosen(self, big: int, routes: Tensor, losses: Tensor) -> _Measured:
        return _Measured(big, self._compute(routes).mean().item(), losses.mean(1))

    def _compute(self, routes: Tensor) -> Tensor:
        return self.model.route_compute(routes.to(self.model.device)).cpu()

    def _measured(self, measured: Measurement) -> _Measured:
        big = (measured.routes == BIG).float().mean().item() * self.depth
        return _Measured(big, measured.compute.mean().item(), measured.loss.mean(1))

    def _point(self, name: str, found: _Measured, all_big: Tensor) -> Numbers:
        """A point of a curve; the interval is that of the paired difference to all-big, which varies less."""
        point = {"big": found.big, "compute": found.compute, "loss": found.loss.mean().item()}
        return (
            point | self._with_interval(name, found.loss - all_big, "minus_all_big") | {"windows": found.loss.tolist()}
        )

    def schedules(self) -> Numbers:
        """A budget that falls or rises along the sequence, and a constant one with the same mean (Fig. 4c)."""
        middle, spread = self.budgets[0], max(1, round(self.depth / 6))
        texts: dict[str, Numbers] = {}
        for name, search in self.searches.items():
            length = self.texts[name].shape[1] - 1
            falling = torch.linspace(middle + spread, middle - spread, length).round().long().clamp(0, self.depth)
            budgets = {"constant": torch.full((length,), middle), "falling": falling, "rising": falling.flip(0)}
            losses = {kind: search.losses(budget).mean(1) for kind, budget in budgets.items()}
            texts[name] = {
                kind: {
                    "big": budgets[kind].tolist(),
                    "mean_big": budgets[kind].float().mean().item(),
                    **self._with_interval(name, loss, "loss"),
                    **self._with_interval(name, loss - losses["constant"], "minus_constant"),
                }
                for kind, loss in losses.items()
            }
        return {"context": "reference", "layers": self.depth, "texts": texts}

    # Figures 5, 6 and 7

    def difficulty(self) -> Numbers:
        """Loss under all-small, all-big and the oracle, token by token of the first window (Fig. 5)."""
        texts = {}
        for name, windows in self.texts.items():
            rows = self.searches[name].difficulty(len(windows), self.tokenizer)
            small, hard = (
                torch.tensor([getattr(row, key) for row in rows]).view(len(windows), -1)
                for key in ("all_small", "difficulty")
            )
            texts[name] = {
                "tokens": [row._asdict() for row in rows if row.window == 0],
                "rank_correlation": self._with_interval(name, rank_correlation(small, hard)),
                "overlap_of_top_tenths": self._with_interval(name, top_overlap(small, hard)),
            }
        return {"context": "reference", "texts": texts}

    def coloured_text(self) -> Numbers:
        """Two windows of each text, for colours by loss and by difficulty (Fig. 6)."""
        texts = {}
        for name, search in self.searches.items():
            rows = search.difficulty(2, self.tokenizer)
            texts[name] = [{key: getattr(row, key) for key in ("token", "all_small", "difficulty")} for row in rows]
        return {"context": "reference", "texts": texts}

    def single_routes(self) -> Numbers:
        """Routes of one sequence of each text: oracle with three actions, soft router, DuoRL's agents (Fig. 7).

        Routes of routers are from the routed context (deployment), those of the oracle from the reference context. If
        three actions give too many routes, the oracle has two.
        """
        texts = {}
        actions = ACTIONS if len(ACTIONS) ** self.depth <= MOST_ROUTES or not self.exact else ("small", "big")
        for name, windows in self.texts.items():
            first = windows[:1, : _SHOWN_TOKENS + 1]
            routers = {"soft": self._soft(self.budgets[1])}
            routers |= {kind: self._made(Wanted(kind, self.size.prices[0])) for kind in self.learners}
            routes = {"oracle": self._best_routes(first, actions)}
            routes |= {kind: measure(self.model, router, first).routes for kind, router in routers.items()}
            texts[name] = {
                "tokens": token_names(first[0, 1:], self.tokenizer),
                "routes": {kind: found[0].T.tolist() for kind, found in routes.items()},  # (L, T)
            }
        return {"actions": list(actions), "layers": self.depth, "oracle_price": _SMALL_PRICE, "texts": texts}

    def _best_routes(self, windows: Tensor, actions: Sequence[str]) -> Tensor:
        if not self.exact:
            start, tokens = self.patterns[self.budgets[1]], windows.to(self.model.device)
            return descent(self.model, tokens, start=start, price=_SMALL_PRICE, actions=actions).routes.cpu()
        table = on_cpu(exhaustive(self.model, windows, actions=actions))
        return table.routes[table.best(_SMALL_PRICE)]

    # Routers

    def _soft(self, big: int, actions: Sequence[str] = ("small", "big")) -> Router:
        """The paper's learned router for a number of big layers."""
        return self._made(Wanted(None, self._soft_compute(big, actions), tuple(actions)))

    def _soft_compute(self, big: int, actions: Sequence[str] = ("small", "big")) -> float:
        """Mean compute with a number of big layers, the others with the cheaper action."""
        least = 0.0 if "skip" in actions else self.model.flops.ffns[0, 1] / self.model.flops.ffns[0, BIG]
        return float(least + big / self.depth * (1 - least))

    def _made(self, wanted: Wanted) -> Router:
        if wanted not in self._routers:
            self.progress(f"load {wanted}")
            self._routers[wanted] = self.router(wanted)
        return self._routers[wanted]

    @cached_property
    def _memories(self) -> dict[str, list]:
        return {
            name: [remember(self.model, part.to(self.model.device)) for part in windows.split(_BATCH)]
            for name, windows in self.texts.items()
        }

    def _in_reference(self, router: Router, name: str) -> Measurement:
        windows, memories = self.texts[name], self._memories[name]
        return measure(self.model, router, windows, context="reference", batch=_BATCH, memories=memories)

    def _routed(self, router: Router, name: str) -> Measurement:
        return measure(self.model, router, self.texts[name], batch=_BATCH)

    def _with_interval(
        self, text: str, values: Tensor, name: str = "mean", statistic: Statistic | None = None
    ) -> Numbers:
        """Mean of (W,), or of each column of (W, n), or a statistic of all columns' means, with its interval."""
        if values.ndim == 1 or statistic is not None:
            values = values if statistic is None else values.T[None]
            found = estimate(values, self.files[text], statistic=statistic)
            return {name: found.value, f"{name}_interval": found.interval}
        columns = [self._with_interval(text, column, name) for column in values.T]
        return {key: [column[key] for column in columns] for key in columns[0]}
