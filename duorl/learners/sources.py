"""Where the labels of learners come from: a search of all routes, a base policy, or a folder of labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from duorl import ranks
from duorl.devices import require_memory
from duorl.inputs import Inputs
from duorl.learners.labels import Deviations, deviated
from duorl.learners.shards import ABOUT, LabelFolder
from duorl.oracle import RouteTable, exhaustive
from duorl.routers import ConstantRouter, Router, load

if TYPE_CHECKING:
    from duorl.learners.base import Task
    from duorl.models import DuoForCausalLM

_MOST_SEARCHED = 1024  # routes; the search of more costs too much for what it adds


class Source:
    """Where the labels of a task come from.

    Args:
        model: a frozen duo model.
        actions: names of the allowed actions.
        base: the base policy of deviations: `random`, the name of an action, or the folder of a saved router, for
            example a fixed pattern; or the folder of labels that `duorl label` made. None: all routes are searched if
            there are at most 1,024; else `random`.

    Attributes:
        searches: whether all routes are searched.
        policy: the base policy; None for random routes.
        stored: labels that were made before, or None.

    Raises:
        ValueError: there is no such router, or the router or the labels do not fit the model.
    """

    def __init__(self, model: DuoForCausalLM, actions: Sequence[str], base: str | None):
        self.model, self.actions = model, actions
        self.policy: Router | None = None
        self.stored: LabelFolder | None = None
        self.searches = base is None and len(actions) ** model.num_layers <= _MOST_SEARCHED
        if base is None or base == "random":
            return
        if base in actions:
            self.policy = ConstantRouter(base)
        elif (Path(base) / ABOUT).is_file():
            self.stored = LabelFolder.open(Path(base), model, actions)
            self.searches = self.stored.searched
        else:
            self.policy = _loaded(base, model, actions)

    def table(self, tokens: Tensor) -> RouteTable | None:
        """All routes of tokens (B, T+1) in the reference context; None if the labels come from deviations."""
        if not self.searches:
            return None
        if self.stored is not None:
            return self.stored.table(tokens)
        tokens = tokens.to(self.model.device)
        table = exhaustive(self.model, tokens.tensor_split(ranks.count())[ranks.rank()], actions=self.actions)
        return replace(table, losses=ranks.joined(table.losses))

    def deviations(
        self, tokens: Tensor, prices: Sequence[float], generator: torch.Generator, inputs: Inputs | None = None
    ) -> Deviations:
        """Deviations from the routes of the base policy, see `deviated`."""
        if self.stored is not None:
            return self.stored.deviations(tokens, inputs)
        more: dict[str, Any] = {"base": self.policy, "generator": generator, "inputs": inputs}
        return deviated(self.model, tokens, prices, self.actions, **more)

    def require(self, tokens: Tensor) -> None:
        """Refuse windows (W, T+1) that stored labels do not have.

        Raises:
            ValueError: says how many are missing.
        """
        if self.stored is not None:
            self.stored.require(tokens)


def require_stored(env: Task, routes: int, windows: int) -> None:
    """Refuse more labelled routes than fit into memory with the states of their layers.

    Args:
        env: the task.
        routes: number of routes, of all tokens.
        windows: number of windows that they are on, for the message.

    Raises:
        ValueError: says how much is needed and how much is free.
    """
    states = 4 * env.layers * routes * env.model.hidden_size
    fix = f"lower windows ({windows})"
    require_memory(2 * states, env.model.device, f"the states of {routes:,} routes", fix)  # twice while they are joined


def _loaded(base: str, model: DuoForCausalLM, actions: Sequence[str]) -> Router:
    try:
        router = load(base).to(model.device)
    except OSError as error:
        names = ", ".join(("random", *actions))
        raise ValueError(f"base must be one of {names}, or the folder of a router or of labels: {error}") from error
    router.require_fit(model)
    return router
