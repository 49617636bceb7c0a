"""The ensemble: several supervised routers, each taught on its own bootstrap of the text, acting on their mean.

After MEMTL (2023): shared inputs, heads trained on bootstraps, their spread as uncertainty. MEMTL's released evaluation
chooses a head per sample with the labels; that is an upper bound and not a router, and is not offered.

    router = train_ensemble(model, windows, price=0.3)
    router.spread(walk.hidden, walk.layer, walk.compute)     # (B, T), how far the members differ
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from duorl.checks import require_positive
from duorl.costs import BIG, SMALL, action_ids
from duorl.models.modeling import DuoForCausalLM
from duorl.routers.base import Router
from duorl.routers.heads import HeadRouter
from duorl.routers.supervised import SupervisedOptions, fit, label_for


@dataclass(frozen=True)
class EnsembleOptions(SupervisedOptions):
    """How an ensemble is trained: as `SupervisedOptions`, and

    Args:
        members: routers in it, K.
    """

    members: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(members=self.members)


class EnsembleRouter(Router):
    """K head routers of the same inputs; deployed, it takes the action with the highest mean score.

    Args:
        layers: L.
        hidden_size: d.
        actions: names of the actions it chooses from, A of them.
        width: hidden units of a head; 0 for a linear map.
        seed: of the first member's initial weights; the others' follow.
        prices: lowest and highest price it is trained for, as for `HeadRouter`.
        price: the price it is deployed at; see `at`.
        members: K.
    """

    def __init__(
        self,
        layers: int,
        hidden_size: int,
        actions: Sequence[str] = ("small", "big"),
        width: int = 0,
        seed: int = 0,
        prices: Sequence[float] | None = None,
        price: float | None = None,
        members: int = 5,
    ):
        super().__init__(
            layers=layers,
            hidden_size=hidden_size,
            actions=list(actions),
            width=width,
            seed=seed,
            prices=None if prices is None else list(prices),
            price=price,
            members=members,
        )
        require_positive(members=members)
        self.codes: Tensor
        self.register_buffer("codes", action_ids(actions), persistent=False)
        self._members = nn.ModuleList(
            HeadRouter(layers, hidden_size, actions, width, seed + member, prices) for member in range(members)
        )

    @property
    def members(self) -> list[HeadRouter]:
        """The K routers."""
        return list(cast(Iterable[HeadRouter], self._members))

    def scores(self, hidden: Tensor, layer: int, compute: Tensor, price: Tensor | None = None) -> Tensor:
        """Every member's scores of the actions: (K, ..., A); arguments as for `HeadRouter.score`."""
        if price is None and self.config["price"] is not None:
            price = torch.tensor(self.config["price"])
        return torch.stack([member.score(hidden, layer, compute, price) for member in self.members])

    def spread(self, hidden: Tensor, layer: int, compute: Tensor) -> Tensor:
        """Uncertainty: the standard deviation over members of the score of big minus that of small.

        Args:
            hidden: (..., d).
            layer: its index.
            compute: (...), spent so far.

        Returns:
            Shape (...), in the scores' unit: nats where the members were taught values.

        Raises:
            ValueError: small and big are not both among the actions.
        """
        known = self.codes.tolist()
        if not {SMALL, BIG} <= set(known):
            raise ValueError(f"spread needs the actions small and big, not {', '.join(self.config['actions'])}")
        scores = self.scores(hidden, layer, compute)
        return (scores[..., known.index(BIG)] - scores[..., known.index(SMALL)]).std(0, correction=0)

    def forward(self, hidden: Tensor, layer: int, compute: Tensor) -> Tensor:
        """(...), the action with the highest mean score; see `Router.forward`."""
        return self.codes[self.scores(hidden, layer, compute).mean(0).argmax(-1)]


def bootstrap(prices: int, windows: int, length: int, generator: torch.Generator) -> Tensor:
    """Windows drawn with replacement, each with all its tokens and prices: the tokens of a window depend on each other.

    Returns:
        Shape (prices * windows * length,), indices of the routes of `Decisions`.
    """
    routes = torch.arange(prices * windows * length).view(prices, windows, length)
    return routes[:, torch.randint(windows, (windows,), generator=generator)].flatten()


def train_ensemble(
    model: DuoForCausalLM,
    windows: Tensor,
    *,
    price: float,
    prices: tuple[float, float] | None = None,
    actions: Sequence[str] = ("small", "big"),
    options: EnsembleOptions | None = None,
    seed: int = 0,
) -> EnsembleRouter:
    """Search some text once and teach each member its own bootstrap of it.

    Args:
        model: a frozen duo model.
        windows: (W, T+1) router-training text; the first `options.windows` are searched.
        price: nats per all-big pass, where no range is given.
        prices: lowest and highest, for a router that takes the price as an input.
        actions: names of the allowed actions.
        options: see `EnsembleOptions`.
        seed: of the initial weights, the drawn routes, the bootstraps and the order of the decisions.

    Raises:
        ValueError: the model has a trainable parameter, or the range of prices is empty or not above 0.
    """
    options = options or EnsembleOptions()
    decisions = label_for(model, windows, options, price=price, prices=prices, actions=actions, seed=seed)
    router = EnsembleRouter(
        model.num_layers, model.hidden_size, actions, options.width, seed, prices, members=options.members
    ).to(model.device)
    generator = torch.Generator().manual_seed(seed)
    shape = len(decisions.price.unique()), len(windows[: options.windows]), windows.shape[1] - 1
    for index, member in enumerate(router.members):
        fit(member, decisions, options=options, seed=seed + index, pool=bootstrap(*shape, generator))
    return router.eval()
