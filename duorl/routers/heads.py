"""HeadRouter: one small network per layer on the hidden state, the policy that every learner here trains."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from duorl.costs import action_ids
from duorl.routers.base import Router


class LayerHeads(nn.Module):
    """One head per layer: a linear map, or a perceptron with one hidden layer, on the normalised state and the compute.

    Args:
        layers: number of layers, L.
        hidden_size: d.
        outputs: numbers per head, O.
        width: hidden units; 0 for a linear map.
        generator: of the initial weights.
    """

    def __init__(self, layers: int, hidden_size: int, outputs: int, width: int, generator: torch.Generator):
        super().__init__()
        sizes = [hidden_size + 1, width, outputs] if width else [hidden_size + 1, outputs]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        if width < 0:
            raise ValueError(f"width must be at least 0 hidden units, not {width}")
        for depth, (fan_in, fan_out) in enumerate(pairwise(sizes), start=2):
            scale = 0.01 if depth == len(sizes) else 2**0.5  # start near the uniform policy
            weight = torch.randn(layers, fan_in, fan_out, generator=generator) * scale * fan_in**-0.5
            self.weights.append(nn.Parameter(weight))
            self.biases.append(nn.Parameter(torch.zeros(layers, fan_out)))

    def forward(self, hidden: Tensor, layer: int | Tensor, compute: Tensor) -> Tensor:
        """Apply the layers' heads.

        Args:
            hidden: (..., d).
            layer: one index for all, or (N,) where hidden is (N, d).
            compute: (...), spent so far.

        Returns:
            Shape (..., O).
        """
        x = torch.cat([layer_norm(hidden, hidden.shape[-1:]), compute[..., None]], dim=-1)
        if isinstance(layer, int):
            return self._head(x, layer)
        order = layer.argsort()
        counts = layer.bincount(minlength=len(self.weights[0])).tolist()
        groups = x[order].split(counts)
        outputs = torch.cat([self._head(group, index) for index, group in enumerate(groups) if len(group)])
        return torch.empty_like(outputs).index_copy(0, order, outputs)

    def _head(self, x: Tensor, layer: int) -> Tensor:
        for depth, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = (torch.relu(x) if depth else x) @ weight[layer] + bias[layer]
        return x


class HeadRouter(Router):
    """A policy with one head per layer; deployed, it takes the likeliest action.

    Args:
        layers: L.
        hidden_size: d.
        actions: names of the actions it chooses from, A of them.
        width: hidden units of a head; 0 for the paper's linear map (Duo-LLM, stage 3).
        seed: of the initial weights.
    """

    def __init__(
        self,
        layers: int,
        hidden_size: int,
        actions: Sequence[str] = ("small", "big"),
        width: int = 0,
        seed: int = 0,
    ):
        super().__init__(layers=layers, hidden_size=hidden_size, actions=list(actions), width=width, seed=seed)
        self.codes: Tensor
        self.register_buffer("codes", action_ids(actions), persistent=False)
        self.heads = LayerHeads(layers, hidden_size, len(actions), width, torch.Generator().manual_seed(seed))

    def logits(self, hidden: Tensor, layer: int | Tensor, compute: Tensor) -> Tensor:
        """Scores of the A actions, (..., A), in the order of their codes; `layer` may be (N,), see `LayerHeads`."""
        return self.heads(hidden, layer, compute)

    def forward(self, hidden: Tensor, layer: int, compute: Tensor) -> Tensor:
        """(...), the likeliest action; see `Router.forward`."""
        return self.codes[self.logits(hidden, layer, compute).argmax(-1)]
