"""Accuracy on tasks of lm-evaluation-harness, beside the compute that a router spends on them.

The harness asks the questions, through its own class for models of Hugging Face. It needs the extra `lm-eval`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from duorl.evaluation.statistics import estimate
from duorl.models import DuoForCausalLM, Transcript
from duorl.models.bases import said
from duorl.routers import Router

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
        `metrics`: by name `value`, its 95 % `interval` over questions, and the paired `minus_all_big` with its
        `minus_interval`. An interval is None if there is one question.
    """
    from lm_eval import evaluator

    rows = []
    for loaded in tasks.values():
        answers, compute = {}, {}
        for name, router in routers.items():
            harness = _harness()(model, tokenizer, router.to(model.device), batch)
            found = evaluator.evaluate(harness, loaded, limit=limit, bootstrap_iters=0, verbosity="ERROR")
            answers[name], compute[name] = found["samples"], harness.compute
        rows += [
            {
                "router": name,
                "task": task,
                "questions": len(own),
                "compute": compute[name],
                "metrics": {
                    metric: _measured(own, answers[ALL_BIG][task], metric) for metric in sorted(own[0]["metrics"])
                },
            }
            for name, samples in answers.items()
            for task, own in samples.items()
        ]
    return rows


Answers = Sequence[Mapping[str, Any]]


def _measured(own: Answers, reference: Answers, metric: str) -> dict[str, Any]:
    value, all_big = (estimate(torch.tensor([float(one[metric]) for one in answers])) for answers in (own, reference))
    difference = value - all_big
    return {
        "value": value.value,
        "interval": value.interval,
        "minus_all_big": difference.value,
        "minus_interval": difference.interval,
    }


@cache
def _harness() -> Any:
    """The harness' class for our models; made when it is needed, because its import takes seconds."""
    from lm_eval.models.huggingface import HFLM

    class Harness(HFLM):
        """Asks a model with a router, and counts the compute."""

        def __init__(self, model: DuoForCausalLM, tokenizer: Any, router: Router, batch: int):
            view, length = model.with_router(router), model.most_positions
            super().__init__(view, tokenizer=tokenizer, batch_size=batch, max_length=length)
            self.router, self.tokens, self.total = router, 0, 0.0

        @property
        def compute(self) -> float:
            """Mean compute of the tokens that were read."""
            return self.total / max(1, self.tokens)

        def _model_call(self, inps: Tensor, attn_mask: Any = None, labels: Any = None) -> Tensor:
            transcript = Transcript(self.router, self.model)
            logits = self.model(input_ids=inps, router=transcript).logits
            padded = inps.flip(1).cumsum(1).flip(1) == 0  # the harness fills up with zeros on the right
            self._count(transcript.routes(inps.shape[1], inps.shape[1])[~padded])
            return logits

        def _model_generate(self, context: Tensor, max_length: int, stop: Any, **options: Any) -> Tensor:
            transcript = Transcript(self.router, self.model)
            written = super()._model_generate(context, max_length, stop, router=transcript, **options)
            routes = transcript.routes(context.shape[1], written.shape[1] - 1)
            self._count(routes[routes[..., 0] >= 0])
            return written

        def _count(self, routes: Tensor) -> None:
            self.total += self.model.route_compute(routes).sum().item()
            self.tokens += len(routes)

    return Harness
