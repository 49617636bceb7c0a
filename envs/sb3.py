"""The Stable-Baselines3 skin: `Lockstep` as a `VecEnv` of N = K * B * T tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv

from envs.gym_env import observation_space, observe
from envs.lockstep import Lockstep, Outcome


class RoutingVecEnv(VecEnv):
    """Whole windows in lockstep for Stable-Baselines3's algorithms.

    All episodes end together, after L steps, and the next begins at once. With group size K the environments
    are K copies of the same B * T tokens, as (K, B, T).

    Args:
        lockstep: the tokens and the dynamics.

    Attributes:
        outcome: the last finished episode's, None before the first.
    """

    def __init__(self, lockstep: Lockstep):
        self.lockstep = lockstep
        self.outcome: Outcome | None = None
        self.render_mode = None
        space = observation_space(lockstep.model.hidden_size, lockstep.layers)
        super().__init__(lockstep.num_tokens, space, spaces.Discrete(len(lockstep.actions)))
        self._infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]

    def reset(self):
        """Begin an episode with the next windows."""
        self.lockstep.draw()
        return observe(self.lockstep)

    def step_async(self, actions: np.ndarray) -> None:
        """Take the actions (N,) of the coming step."""
        self._actions = torch.from_numpy(np.asarray(actions, dtype=np.int64))

    def step_wait(self):
        """Decide one layer; SB3's (observations, rewards, dones, infos)."""
        rewards = self.lockstep.step(self._actions.to(self.lockstep.codes.device)).float().cpu().numpy()
        done = self.lockstep.done
        if done:
            self.outcome = self.lockstep.outcome
            self.lockstep.draw()
        return observe(self.lockstep), rewards, np.full(self.num_envs, done), self._infos

    def seed(self, seed: int | None = None):
        """Start the order of the windows anew."""
        self.lockstep.seed(seed or 0)
        return [seed] * self.num_envs

    def close(self) -> None:
        """Nothing to close."""

    def get_attr(self, attr_name: str, indices=None) -> list[Any]:
        """The attribute, once per environment asked for."""
        return [getattr(self, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices=None) -> None:
        """Set an attribute, for all environments alike."""
        setattr(self, attr_name, value)

    def env_method(self, method_name: str, *args, indices=None, **kwargs) -> list[Any]:
        """Refused: the tokens are rows of one batch, not environments with methods."""
        raise NotImplementedError("the tokens of a lockstep batch have no methods of their own")

    def env_is_wrapped(self, wrapper_class, indices=None) -> list[bool]:
        """None is."""
        return [False] * len(list(self._get_indices(indices)))
