"""The result of an episode of tokens in lockstep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from duorl.costs import ACTIONS


@dataclass(frozen=True)
class Outcome:
    """The result of an episode of N tokens.

    Attributes:
        loss: (N,) nats.
        gain: (N,) nats, reference loss - loss.
        compute: (N,), in [0, 1].
        rewards: (L, N).
        credits: (L, N), the rewards that a learner uses: with a `Credit` for later tokens, if there is one.
        routes: (N, L) int64, action codes.
        parts: the rewards of each part of a sum, (L, N), by the part's name.
    """

    loss: Tensor
    gain: Tensor
    compute: Tensor
    rewards: Tensor
    credits: Tensor
    routes: Tensor
    parts: Mapping[str, Tensor]

    def metrics(self) -> dict[str, float]:
        """Means over tokens, and the share of each action in each layer, by TensorBoard tag."""
        means = {
            "rollout/return": self.rewards.sum(0).mean().item(),
            "rollout/gain": self.gain.mean().item(),
            "rollout/compute": self.compute.mean().item(),
            "rollout/loss": self.loss.mean().item(),
        }
        means |= {f"reward/{name}": earned.sum(0).mean().item() for name, earned in self.parts.items()}
        for code, name in enumerate(ACTIONS):
            shares = (self.routes == code).float().mean(0).tolist()
            means |= {f"actions_{name}/layer_{layer}": share for layer, share in enumerate(shares)}
        return means
