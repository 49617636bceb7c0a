"""The supervised router: imitates the oracle's actions by cross-entropy, no reinforcement learning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from duorl.checks import require_positive
from duorl.costs import action_ids
from duorl.models.loading import require_frozen
from duorl.models.modeling import DuoForCausalLM
from duorl.oracle import exhaustive
from duorl.routed_pass import RoutedPass, remember
from duorl.routers.heads import HeadRouter


@dataclass(frozen=True)
class SupervisedOptions:
    """How the supervised router is trained.

    Args:
        windows: windows of router-training text that the oracle labels.
        epochs: passes over the labelled decisions.
        batch_size: decisions per update.
        learning_rate: of Adam.
        width: hidden units of a head; 0 for a linear map.
    """

    windows: int = 64
    epochs: int = 10
    batch_size: int = 4096
    learning_rate: float = 3e-3
    width: int = 0

    def __post_init__(self) -> None:
        require_positive(windows=self.windows, epochs=self.epochs, batch_size=self.batch_size)


@torch.no_grad()
def oracle_decisions(
    model: DuoForCausalLM, tokens: Tensor, *, price: float, actions: Sequence[str]
) -> tuple[Tensor, Tensor, Tensor]:
    """What the oracle saw and did on its own routes, in the reference context.

    Returns:
        hidden (L, N, d), compute so far (L, N), and the index of the action taken among `actions` (L, N).
    """
    tokens = tokens.to(model.device)
    table = exhaustive(model, tokens, context="reference", actions=actions)
    routes = table.routes[table.best(price)]
    walk = RoutedPass(model, tokens, context="reference", memory=remember(model, tokens))
    hidden, compute = [], []
    while not walk.done:
        hidden.append(walk.hidden.flatten(0, 1))
        compute.append(walk.compute.flatten())
        walk.step(routes[..., walk.layer])
    labels = torch.searchsorted(action_ids(actions).to(routes.device), routes.flatten(0, 1).T.contiguous())
    return torch.stack(hidden), torch.stack(compute), labels


def train_supervised(
    model: DuoForCausalLM,
    windows: Tensor,
    *,
    price: float,
    actions: Sequence[str] = ("small", "big"),
    options: SupervisedOptions | None = None,
    seed: int = 0,
) -> HeadRouter:
    """Imitate the oracle's best routes at a price.

    Args:
        model: a frozen duo model.
        windows: (W, T+1) router-training text; the first `options.windows` are searched.
        price: nats per all-big pass.
        actions: names of the allowed actions.
        options: see `SupervisedOptions`.
        seed: of the initial weights and the order of the decisions.

    Raises:
        ValueError: the model has a trainable parameter.
    """
    require_frozen(model)
    options = options or SupervisedOptions()
    tokens = windows[: options.windows]
    hidden, compute, labels = oracle_decisions(model, tokens, price=price, actions=actions)
    router = HeadRouter(model.num_layers, model.hidden_size, actions, options.width, seed).to(model.device)
    optimizer = torch.optim.Adam(router.parameters(), lr=options.learning_rate)
    generator = torch.Generator().manual_seed(seed)
    size = max(1, options.batch_size // model.num_layers)  # tokens per update, each with its L decisions
    for _ in range(options.epochs):
        for index in torch.randperm(hidden.shape[1], generator=generator).split(size):
            scores = [router.logits(hidden[i, index], i, compute[i, index]) for i in range(model.num_layers)]
            loss = cross_entropy(torch.stack(scores).flatten(0, 1), labels[:, index].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return router.eval().requires_grad_(False)
