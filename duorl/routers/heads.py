"""HeadRouter: one small network per layer that reads the hidden state. Most learners train it.

A router can be trained for a range of prices. Then the price is one of its inputs, and `router.at(price=0.3)` is the
router at one price.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, one_hot

from duorl.costs import action_ids
from duorl.inputs import Inputs, View
from duorl.routers.base import LogitRouter

_LEANING = 2.0  # nats that are added to the logits of a route's actions
_RATED_WIDTH = 192  # hidden size at which the learners' default rates were found


class LayerHeads(nn.Module):
    """One head per layer, linear or with one hidden layer. It reads the normalized hidden state and the compute.

    Args:
        layers: number of layers, L.
        hidden_size: d.
        outputs: numbers per head, O.
        width: hidden units; 0 for a linear map.
        generator: draws the initial weights.
        features: number of further inputs, C.
    """

    def __init__(
        self,
        layers: int,
        hidden_size: int,
        outputs: int,
        width: int,
        generator: torch.Generator,
        features: int = 0,
    ):
        super().__init__()
        inputs = hidden_size + 1 + features
        sizes = [inputs, width, outputs] if width else [inputs, outputs]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        if width < 0:
            raise ValueError(f"width must be at least 0 hidden units, not {width}")
        for depth, (fan_in, fan_out) in enumerate(pairwise(sizes), start=2):
            scale = 0.01 if depth == len(sizes) else 2**0.5  # start near the uniform policy
            weight = torch.randn(layers, fan_in, fan_out, generator=generator) * scale * fan_in**-0.5
            if depth == 2:
                weight[:, :hidden_size] /= state_scale(hidden_size)
            self.weights.append(nn.Parameter(weight))
            self.biases.append(nn.Parameter(torch.zeros(layers, fan_out)))

    def forward(self, hidden: Tensor, layer: int | Tensor, compute: Tensor, features: Tensor | None = None) -> Tensor:
        """Apply the layers' heads.

        Args:
            hidden: (..., d).
            layer: one index for all, or (N,) if hidden is (N, d).
            compute: (...), compute so far.
            features: (..., C), the further inputs, if there are any.

        Returns:
            Shape (..., O).
        """
        return apply_heads([self], hidden, layer, compute, features)[0]

    def head(self, x: Tensor, layer: int) -> Tensor:
        """One layer's head on its inputs: (..., d + 1 + C) to (..., O)."""
        for depth, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = (torch.relu(x) if depth else x) @ weight[layer] + bias[layer]
        return x


def state_scale(hidden_size: int) -> float:
    """What a head's normalised hidden state is multiplied by, so that one learning rate serves wide models too.

    A step of Adam moves every weight by about the learning rate, so that it moves a logit by up to hidden_size times
    the rate: a policy on wide states would be decided by the noise of a few updates. The scale bounds the step by
    what it is at the width for which the default rates were found. It is 1/d up to a constant, as in Yang et al. 2022
    (Tensor Programs V, arXiv 2203.03466, table 8), there a factor of the rate. Narrower states are left as they are.
    """
    return min(1.0, _RATED_WIDTH / hidden_size)


def apply_heads(
    heads: Sequence[LayerHeads], hidden: Tensor, layer: int | Tensor, compute: Tensor, features: Tensor | None = None
) -> list[Tensor]:
    """Apply several heads, of actor and critic, to the same inputs; these are normalized and grouped by layer once.

    Args:
        heads: heads with equal numbers of layers.
        hidden, layer, compute, features: see `LayerHeads.forward`.

    Returns:
        One (..., O) for each of the heads.
    """
    width, dtype = hidden.shape[-1], heads[0].weights[0].dtype  # the precision of the model may be lower
    parts = [layer_norm(hidden.to(dtype), (width,)) * state_scale(width), compute[..., None]]
    x = torch.cat(parts if features is None else [*parts, features], dim=-1).to(dtype)
    if isinstance(layer, int):
        return [each.head(x, layer) for each in heads]
    order = layer.argsort()
    groups = x.index_select(0, order).split(layer.bincount(minlength=len(heads[0].weights[0])).tolist())
    found = []
    for each in heads:
        outputs = torch.cat([each.head(group, index) for index, group in enumerate(groups) if len(group)])
        found.append(torch.empty_like(outputs).index_copy(0, order, outputs))
    return found


class HeadRouter(LogitRouter):
    """A policy with one head per layer. In deployment it takes the most probable action.

    Args:
        layers: L.
        hidden_size: d.
        actions: names of the actions it chooses from, A of them.
        width: hidden units of a head; 0 for the paper's linear map (Duo-LLM, stage 3).
        seed: seed of the initial weights.
        prices: lowest and highest price in training; the price is then an input. None: one price, no input.
        price: the price it is deployed at, in nats per all-big pass; see `at`.
        inputs: names of the heads' further inputs, see `duorl.inputs`.

    Raises:
        ValueError: the range of prices is empty or not above 0, or an input is unknown.
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
        inputs: Sequence[str] = (),
    ):
        super().__init__(
            layers=layers,
            hidden_size=hidden_size,
            actions=list(actions),
            width=width,
            seed=seed,
            prices=None if prices is None else list(prices),
            price=price,
            inputs=list(inputs),
        )
        self.inputs = Inputs(inputs, prices)
        self.register_buffer("codes", action_ids(actions), persistent=False)
        generator = torch.Generator().manual_seed(seed)
        features = self.inputs.width(hidden_size)
        self.heads = LayerHeads(layers, hidden_size, len(actions), width, generator, features)

    def leaning(self, route: Sequence[int]) -> HeadRouter:
        """Change the biases so that the policy starts near a route of L action codes, but still explores.

        Raises:
            ValueError: the route has another length, or an action that the router does not have.
        """
        known = self.codes.tolist()
        if len(route) != self.config["layers"] or not set(route) <= set(known):
            raise ValueError(f"a route here has {self.config['layers']} codes out of {known}, not {list(route)}")
        taken = torch.tensor([known.index(action) for action in route])
        self.heads.biases[-1].data += _LEANING * one_hot(taken, len(known))
        return self

    def flops(self) -> float:
        """See `Router.flops`; biases are no matrices, though those of all layers stand in one."""
        return 2.0 * sum(weight.numel() for weight in self.heads.weights)

    def logits(self, view: View) -> Tensor:
        """The outputs of the heads, (..., A); their softmax is the policy. See `LogitRouter.logits`."""
        view = self.priced(view)
        return self.heads(view.hidden, view.layer, view.compute, self.inputs(view))
