"""`duorl evaluate`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from torch import Tensor

from duorl.checks import require_positive
from duorl.costs import ACTIONS, action_ids
from duorl.evaluation.compare import Comparer
from duorl.evaluation.measure import measure
from duorl.evaluation.tasks import ALL_BIG, load_tasks, task_rows
from duorl.evaluation.transfer import learned_on
from duorl.experiments.comparing import MIX, RESULTS, check_evaluation, compare, fixed_mix, make_comparer, write
from duorl.experiments.material import Material
from duorl.experiments.voice import command, say, say_written, status
from duorl.files import write_json
from duorl.models import DuoForCausalLM
from duorl.prices import check_price
from duorl.reports.figures import transfer_lines
from duorl.reports.tasks import tasks_markdown
from duorl.routers import ConstantRouter, LogitRouter, Router, spent
from duorl.routers import load as load_router


def prepare(options: Namespace, config: dict[str, Any]) -> tuple[str, Callable[[Path], None]]:
    """The default name of the folder, and the function that measures the router.

    Raises:
        ValueError, OSError: the input cannot be used; the message names the thing and the fix.
    """
    action_ids(options.actions), action_ids([options.reference])
    price = check_price(options.price)
    router = load_router(options.router)
    if router.takes_price:
        router = router.at(price=price)
    _check_actions(router, options)
    material = Material.of(options, options.window)
    model, tokenizer = material.model, material.tokenizer
    router = router.to(model.device)
    router.require_fit(model)
    training = material.read(options.corpus, split="router").tokens
    held_out = material.read(options.corpus, split="evaluation")
    learned = None if options.learned_on is None else material.read(options.learned_on, split="evaluation")
    _try(router, model, held_out.tokens[:1])
    check_evaluation(options, model, training, held_out.tokens)
    calibration = _Calibration.of(options, router, model, training)
    require_positive(task_questions=options.task_questions or 1, task_batch=options.task_batch)
    names = options.tasks.split(",") if isinstance(options.tasks, str) else options.tasks
    tasks = load_tasks(names) if names else {}

    def work(folder: Path) -> None:
        comparer = make_comparer(options, model, training, held_out.tokens, price, files=held_out.files)
        name = _row_name(options.router)
        routers: dict[str, list[Router]] = {name: [router], "best fixed": [comparer.fixed]}
        routers |= fixed_mix(comparer, router, training[: comparer.options.fixed_windows])
        routers |= {f"all-{action}": [ConstantRouter(action)] for action in ("small", "big")}
        settings = {"command": command(), **config}
        if calibration is not None:
            routers |= calibration.rows(name, comparer)
            settings["calibration"] = calibration.found
        comparison = compare(comparer, routers, settings)
        if learned is not None:
            count = comparer.options.windows
            found = learned_on(model, router, held_out.first(count), learned.first(count))
            comparison.rows[0]["learned_on"] = {"text": options.learned_on, **found}
        if tasks:
            known = {ALL_BIG: ConstantRouter("big"), "all-small": ConstantRouter("small"), "best fixed": comparer.fixed}
            size = {"limit": options.task_questions, "batch": options.task_batch}
            rows = task_rows(model, tokenizer, {name: router, **known}, tasks, **size)
            write_json(folder / "tasks.json", rows)
            say(tasks_markdown(rows))
        write(comparison, comparer.traces(tokenizer), folder)
        for line in transfer_lines(comparison):
            say(line)
        say_written(folder, *RESULTS, "tasks.json")

    return "evaluate", work


@dataclass(frozen=True)
class _Calibration:
    """A router that is calibrated to a compute.

    Attributes:
        target: the compute.
        router: the calibrated router.
        found: the text, the number of windows, the compute on them, and the price or the shifts that were found.
    """

    target: float
    router: Router
    found: dict[str, Any]

    @classmethod
    def of(cls, options: Namespace, router: Router, model: DuoForCausalLM, training: Tensor) -> _Calibration | None:
        """Calibrate to the option `target_compute`, if it is given; errors as for `Router.calibrated`."""
        if (target := options.target_compute) is None:
            return None
        windows = training[: options.evaluation.sized(model.num_layers).fixed_windows]
        with status(f"calibrate {options.router}"):
            router = router.calibrated(model, windows, compute=target)
            compute = spent(model, router, windows)
        found = {"target_compute": target, "text": options.corpus, "split": "router", "windows": len(windows)}
        setting: dict[str, Any] = {key: router.config[key] for key in ("price", "shifts") if key in router.config}
        return cls(target, router, {**found, "compute": compute, **setting})

    def rows(self, name: str, comparer: Comparer) -> dict[str, list[Router]]:
        """The calibrated router, and the best mixture of fixed patterns at the same compute."""
        mixture = comparer.baseline.mixed(self.target)
        return {f"{name} at {self.target:g}": [self.router], f"{MIX} at {self.target:g}": [mixture]}


def _check_actions(router: Router, options: Namespace) -> None:
    """Refuse a router with actions that the oracle may not take: it could be better than the bound."""
    if isinstance(router, LogitRouter):
        more = [ACTIONS[code] for code in router.codes.tolist() if ACTIONS[code] not in options.actions]
        if more:
            raise ValueError(f"{options.router} may take {more[0]}, which is not among --actions {options.actions}")


def _try(router: Router, model: DuoForCausalLM, windows: Tensor) -> None:
    """Run the router on one window, so that a bad router is refused before anything is written."""
    try:
        measure(model, router, windows)
    except Exception as error:  # a user's class may raise anything
        name = type(router).__name__
        raise ValueError(f"the router {name} fails on the first window: {type(error).__name__}: {error}") from error


def _row_name(router: str) -> str:
    """The last two parts of its folder's path."""
    return "/".join(Path(router).parts[-2:])
