"""Rollout buffers for Stable-Baselines3: observations are tensors, advantages are relative to a group of copies."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
import torch
from sb3_contrib.common.maskable.buffers import MaskableDictRolloutBuffer, MaskableDictRolloutBufferSamples
from stable_baselines3.common.buffers import DictRolloutBuffer
from stable_baselines3.common.type_aliases import DictRolloutBufferSamples
from torch import Tensor

from duorl.agents.advantages import leave_one_out, rewards_to_go


class GroupRolloutBuffer(DictRolloutBuffer):
    """A rollout of whole episodes, L steps of N tokens.

    Stable-Baselines3 copies observations to arrays and back, and this is most of the time of its rollouts. Here
    observations stay the tensors of the model. With K copies of each token, the baseline of the advantage is the
    leave-one-out mean of the group, not the critic. This mean is unbiased and includes the difficulty of the token,
    which a critic has to estimate.

    Args:
        group_size: K; with 1, advantages are those of Stable-Baselines3 (GAE).
        args, kwargs: arguments from Stable-Baselines3.
    """

    sample_class: type[Any] = DictRolloutBufferSamples

    def __init__(self, *args, group_size: int, **kwargs):
        self.group_size = group_size
        self._stored: dict[str, Tensor] = {}
        super().__init__(*args, **kwargs)

    def reset(self) -> None:
        """Begin a new rollout; its observations replace those of the last one, in the same memory."""
        shapes, self.obs_shape = self.obs_shape, {}  # no arrays for the observations
        super().reset()
        self.obs_shape = shapes

    def add(self, obs, *args, **kwargs) -> None:
        """Add one step of N tokens; see `DictRolloutBuffer.add`."""
        for key, values in obs.items():
            if key not in self._stored:
                self._stored[key] = values.new_empty(self.buffer_size, *values.shape)
            self._stored[key][self.pos] = values
        super().add({}, *args, **kwargs)

    def compute_returns_and_advantage(self, last_values: Tensor, dones: np.ndarray) -> None:
        """Fill `returns` and `advantages`, both (L, N), and show the observations, each (L, N, ...)."""
        self.observations: dict[str, Any] = dict(self._stored)
        super().compute_returns_and_advantage(last_values, dones)
        if self.group_size > 1:
            returns = rewards_to_go(torch.from_numpy(self.rewards))
            self.advantages = (returns - leave_one_out(returns, self.group_size)).numpy()

    def get(self, batch_size: int | None = None) -> Generator[Any, None, None]:  # type: ignore[override]
        """Minibatches in the same random order as in Stable-Baselines3."""
        total = self.buffer_size * self.n_envs
        # Stable-Baselines3 counts decisions token by token; here they are stored layer by layer.
        token, layer = np.divmod(np.random.permutation(total), self.buffer_size)
        order = torch.from_numpy(layer * self.n_envs + token)
        for index in order.split(batch_size or total):
            yield self._batch(index)

    def _batch(self, index: Tensor) -> Any:
        columns = {
            "old_values": self.values,
            "old_log_prob": self.log_probs,
            "advantages": self.advantages,
            "returns": self.returns,
        }
        observations = {}
        for key, steps in self.observations.items():
            observations[key] = steps.flatten(0, 1).index_select(0, index.to(steps.device))
        return self.sample_class(
            observations=observations,
            actions=self._picked(self.actions.astype(np.float32), index),
            **{name: self._picked(values, index).flatten() for name, values in columns.items()},
            **self._more(index),
        )

    def _picked(self, values: np.ndarray, index: Tensor) -> Tensor:
        return torch.from_numpy(values).flatten(0, 1).index_select(0, index).to(self.device)

    def _more(self, index: Tensor) -> dict[str, Tensor]:
        """Further columns of a batch."""
        return {}


class MaskableGroupRolloutBuffer(GroupRolloutBuffer, MaskableDictRolloutBuffer):  # type: ignore[misc]
    """For MaskablePPO."""

    sample_class = MaskableDictRolloutBufferSamples

    @property
    def allowed(self) -> Tensor:
        """Choices that were not ruled out, bool, (L * N, A)."""
        return torch.from_numpy(self.action_masks).flatten(0, 1).bool()

    def _more(self, index: Tensor) -> dict[str, Tensor]:
        return {"action_masks": self._picked(self.action_masks, index)}
