"""Accuracy on tasks of lm-evaluation-harness, beside the compute that a router spends on them.

The harness asks the questions, through its own class for models of Hugging Face. It needs the extra `lm-eval`.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from duorl.checks import BadInput
from duorl.evaluation.frontier import Frontier, Ladder
from duorl.evaluation.statistics import Estimate, estimate, named
from duorl.models import DuoForCausalLM, Transcript
from duorl.models.bases import said
from duorl.models.footprint import Batch, require_room
from duorl.models.transcript import NOT_ROUTED
from duorl.routers import ConstantRouter, PatternRouter, Router

ALL_BIG = "all-big"
"""Name of the router with which the others are compared."""


def load_tasks(names: Sequence[str]) -> dict[str, Any]:
    """The tasks of these names, or in YAML files, with their data.

    Raises:
        ValueError: the extra is missing, there is no such task, or its data cannot be loaded.
    """
    if find_spec("lm_eval") is None:
        raise ValueError('tasks need lm-evaluation-harness: pip install "lm-eval>=0.4.9"')
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager

    manager, found = TaskManager(include_defaults=not all(map(_is_file, names))), {}
    for name in names:
        try:
            found[name] = manager.load([name])
        except KeyError as problem:
            raise ValueError(f"no task {name!r}: give a task of lm-evaluation-harness, or a YAML file") from problem
        except Exception as problem:  # of many kinds: what the harness and its data sets raise
            raise ValueError(f"cannot load the task {name}: {said(problem)}") from problem
    return found


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def task_rows(
    model: DuoForCausalLM,
    tokenizer: Any,
    routers: Mapping[str, Router],
    tasks: Mapping[str, Any],
    *,
    limit: int | None = None,
    batch: int = 8,
) -> list[dict[str, Any]]:
    """A row per task and router.

    Args:
        model: a duo model.
        tokenizer: of the model.
        routers: by name; `ALL_BIG` is one of them.
        tasks: of `load_tasks`.
        limit: first questions of each task; None: all.
        batch: texts per pass. It does not change the results.

    Returns:
        Rows with `router`, `task`, `questions`, `compute` (mean over the tokens that were read, without padding), and
        `metrics`: by name `value`, its 95 % `interval` over questions, and two paired differences with their intervals:
        `minus_all_big`, and `minus_mix` to the best mixture of the fixed routers among the given ones at the same
        compute (None for these themselves, and where they do not spend so much). An interval is None if there is one
        question.
    """
    from lm_eval import evaluator

    rows = []
    for loaded in tasks.values():
        answers, compute, rises = {}, {}, {}
        for name, router in routers.items():
            harness = _harness()(model, tokenizer, router.to(model.device), batch)
            found = evaluator.evaluate(harness, loaded, limit=limit, bootstrap_iters=0, verbosity="ERROR")
            answers[name], compute[name], rises = found["samples"], harness.compute, found["higher_is_better"]
        fixed = [name for name, router in routers.items() if isinstance(router, (ConstantRouter, PatternRouter))]
        for task in answers[ALL_BIG]:
            values = {
                metric: {name: _values(answers[name][task], metric) for name in routers}
                for metric in sorted(answers[ALL_BIG][task][0]["metrics"])
            }
            for name in routers:
                metrics = {
                    metric: _measured(name, known, compute, fixed, rises.get(task, {}).get(metric))
                    for metric, known in values.items()
                }
                count = len(answers[name][task])
                row = {"router": name, "task": task, "questions": count, "compute": compute[name]}
                rows.append({**row, "metrics": metrics})
    return rows


def _values(answers: Sequence[Mapping[str, Any]], metric: str) -> Tensor:
    return torch.tensor([float(one[metric]) for one in answers], dtype=torch.float64)


def _measured(
    name: str, known: Mapping[str, Tensor], compute: Mapping[str, float], fixed: Sequence[str], rises: bool | None
) -> dict[str, Any]:
    """A metric of one router, from the values of all, (Q,) each; `rises`: whether more of it is better, or None."""
    value = estimate(known[name])
    difference = value - estimate(known[ALL_BIG])
    return {
        "value": value.value,
        "interval": value.interval,
        "minus_all_big": difference.value,
        "minus_interval": difference.interval,
        **named("minus_mix", None if name in fixed else _minus_mix(name, known, compute, fixed, rises)),
    }


def _minus_mix(
    name: str, known: Mapping[str, Tensor], compute: Mapping[str, float], fixed: Sequence[str], rises: bool | None
) -> Estimate | None:
    """The difference to the best mixture of fixed routers. It is chosen on the same questions, which favours it."""
    if rises is None:
        return None
    sign = -1.0 if rises else 1.0

    def spent(name: str) -> Tensor:
        return torch.full_like(known[name], compute[name])

    ladder = Ladder(torch.stack([spent(one) for one in fixed]), sign * torch.stack([known[one] for one in fixed]))
    found = Frontier([ladder]).excess(sign * known[name][None], spent(name)[None])
    return found if found is None or not rises else -found


@cache
def _harness() -> Any:
    """The harness' class for our models; made when it is needed, because its import takes seconds."""
    from lm_eval.models.huggingface import HFLM

    class Harness(HFLM):
        """Asks a model with a router, and counts the compute."""

        def __init__(self, model: DuoForCausalLM, tokenizer: Any, router: Router, batch: int):
            view, length = model.with_router(router), model.most_positions
            super().__init__(view, tokenizer=tokenizer, batch_size=batch, max_length=length)
            self.duo, self.router, self.tokens, self.total = model, router, 0, 0.0
            self._called: list[Tensor] = []

        @property
        def compute(self) -> float:
            """Mean compute of the tokens that were read."""
            return self.total / max(1, self.tokens)

        def _model_call(self, inps: Tensor, attn_mask: Any = None, labels: Any = None) -> Tensor:
            self._require_room(inps)
            transcript = Transcript(self.router, self.duo)
            logits = self.duo(input_ids=inps, router=transcript).logits
            self._called = list(transcript.routes)
            return logits

        def _require_room(self, texts: Tensor) -> None:
            """The harness begins with the longest texts, so what does not fit is refused at the beginning."""
            logits = 4 * texts.numel() * self.duo.config.backbone.vocab_size  # float32, of all tokens at once
            try:
                require_room(self.duo, Batch(*texts.shape), f"lower task_batch ({self.batch_size})", beside=logits)
            except ValueError as error:
                raise BadInput(str(error)) from error

        def _select_cont_toks(self, logits: Tensor, contlen: int | None = None, inplen: int | None = None) -> Tensor:
            """Of the next row of the last call, whose length is known here alone: it is filled up on the right."""
            self._count(self._called.pop(0)[:inplen])
            return super()._select_cont_toks(logits, contlen=contlen, inplen=inplen)

        def _model_generate(self, context: Tensor, max_length: int, stop: Any, **options: Any) -> Tensor:
            found = super()._model_generate(context, max_length, stop, return_dict_in_generate=True, **options)
            start = context.shape[1]
            for text, routes in zip(found.sequences, found.routes, strict=True):
                routes = routes[: start + self._length(text[start:], stop) - 1]
                self._count(routes[routes[:, 0] != NOT_ROUTED])
            return found.sequences

        def _length(self, answer: Tensor, stop: Sequence[str]) -> int:
            """Number of tokens to the end of the first stop string; the harness goes on for other texts of a batch."""
            sizes = range(1, len(answer) + 1)
            return 1 + bisect_left(sizes, True, key=lambda n: any(one in self.tok_decode(answer[:n]) for one in stop))

        def _count(self, routes: Tensor) -> None:
            self.total += self.duo.route_compute(routes).sum().item()
            self.tokens += len(routes)

    return Harness
