"""Training of the ensemble: every member learns from its own bootstrap sample of the same labels (MEMTL, 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from duorl.checks import require_positive
from duorl.learners.base import Task
from duorl.learners.supervised import Target, Taught, shuffled, taught_loss
from duorl.paths import RouterPath
from duorl.routers import EnsembleRouter


class Ensemble(Taught):
    """Labels some text once and trains each member of an `EnsembleRouter` on its own bootstrap sample of it.

    `learn` always makes `epochs` passes, for any number of decisions. An update is one pass of every member.

    Args:
        env: the task; its seed also starts the weights, the random routes, the bootstraps and the orders.
        members: number of members, K.

    The other options are those of `Supervised`.

    Raises:
        ValueError: as for `Supervised`, or `members` is below 1.
    """

    router: EnsembleRouter
    stateful = ("optimizers", "generators")

    def __init__(
        self,
        env: Task,
        *,
        members: int = 5,
        windows: int = 64,
        target: Target = "cost",
        temperature: float = 1.0,
        rungs: int = 5,
        epochs: int = 5,
        batch_size: int = 4096,
        learning_rate: float = 3e-3,
        width: int = 0,
        base: RouterPath | None = None,
    ):
        super().__init__(env)
        require_positive(members=members)
        taught = {"windows": windows, "rungs": rungs, "epochs": epochs, "batch_size": batch_size}
        self.prepare(target=target, temperature=temperature, base=base, **taught)
        self.router = EnsembleRouter(
            env.layers,
            env.model.hidden_size,
            env.actions,
            width,
            env.first_seed,
            env.prices,
            members=members,
            inputs=env.inputs,
        ).to(env.model.device)
        self.optimizers = [torch.optim.Adam(member.parameters(), lr=learning_rate) for member in self.router.members]
        self.generators = [torch.Generator().manual_seed(env.first_seed + index) for index in range(members)]
        self._pools = self._bootstraps()

    def update(self) -> dict[str, float]:
        """One pass of every member over its bootstrap sample; returns the metrics by tag."""
        losses = []
        decisions, size = self.labels.decisions(), self.batch_size // self.env.layers
        for place, member in enumerate(self.router.members):
            optimizer, pool = self.optimizers[place], self._pools[place]
            for index in shuffled(self.labels.count, size, self.generators[place], pool):
                loss = taught_loss(member, decisions, index, target=self.target, temperature=self.temperature)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        return {"train/loss": sum(losses) / len(losses)}

    def _bootstraps(self) -> list[Tensor]:
        windows, length = self.labels.text[:, 1:].shape
        shape = self.labels.rounds, windows, length
        generator = torch.Generator().manual_seed(self.env.first_seed)
        return [bootstrap(*shape, generator) for _ in self.router.members]


def bootstrap(prices: int, windows: int, length: int, generator: torch.Generator) -> Tensor:
    """Draw windows with replacement, each with all its tokens and prices, because tokens of a window are dependent.

    Returns:
        Shape (prices * windows * length,), indices of the routes of `Decisions`.
    """
    routes = torch.arange(prices * windows * length).view(prices, windows, length)
    return routes[:, torch.randint(windows, (windows,), generator=generator)].flatten()
