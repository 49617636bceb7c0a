"""The Stable-Baselines3 skin: `Lockstep` as a `VecEnv` of N = K * B * T tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from duorl.envs.gym_env import observation_space, observe, observe_tensors
from duorl.envs.lockstep import Lockstep, Outcome
from duorl.envs.told import checked_actions


class RoutingVecEnv(VecEnv):
    """Whole windows in lockstep for Stable-Baselines3's algorithms.

    All episodes end together, after L steps, and the next begins at once. With group size K the environments
    are K copies of the same B * T tokens, as (K, B, T).

    Args:
        lockstep: the tokens and the dynamics.
        tensors: observations are tensors in place of arrays, for algorithms whose buffers hold them; the last
            observation of an episode is then not kept, which no algorithm reads where episodes are not cut short.

    Attributes:
        outcome: the last finished episode's, None before the first.
    """

    def __init__(self, lockstep: Lockstep, *, tensors: bool = False):
        self.lockstep = lockstep
        self._tensors = tensors
        self._observe = observe_tensors if tensors else observe
        self.outcome: Outcome | None = None
        self.render_mode = None
        super().__init__(lockstep.num_tokens, observation_space(lockstep), spaces.Discrete(len(lockstep.actions)))

    @property
    def _infos(self) -> list[dict[str, Any]]:
        """Fresh ones: wrappers write into them."""
        return [{} for _ in range(self.num_envs)]

    def reset(self):
        """Begin an episode with the next windows."""
        self.lockstep.draw()
        return self._observe(self.lockstep)

    def step_async(self, actions: np.ndarray) -> None:
        """Take the actions (N,) of the coming step."""
        self._actions = checked_actions(self.lockstep, actions)

    def step_wait(self):
        """Decide one layer; SB3's (observations, rewards, dones, infos)."""
        rewards = self.lockstep.step(self._actions.to(self.lockstep.codes.device)).float().cpu().numpy()
        done, infos = self.lockstep.done, self._infos
        if done:
            self.outcome = self.lockstep.outcome
            infos = self._last_infos()
            self.lockstep.draw()
        return self._observe(self.lockstep), rewards, np.full(self.num_envs, done), infos

    def _last_infos(self) -> list[dict[str, Any]]:
        """What Stable-Baselines3 expects of episodes that end: their last observation. They are never cut short."""
        if self._tensors:
            return self._infos
        final = self._observe(self.lockstep)
        ends = ({key: values[token] for key, values in final.items()} for token in range(self.num_envs))
        return [{"TimeLimit.truncated": False, "terminal_observation": end} for end in ends]

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
        """`action_masks`, one (A,) per token; the tokens are rows of one batch and have no other methods."""
        if method_name != "action_masks":
            raise NotImplementedError(f"the tokens of a lockstep batch have no method {method_name!r}")
        return list(self.lockstep.action_masks().cpu().numpy())

    def has_attr(self, attr_name: str) -> bool:
        """Whether the batch, or the lockstep behind it, has it."""
        return hasattr(self, attr_name) or hasattr(self.lockstep, attr_name)

    def env_is_wrapped(self, wrapper_class, indices=None) -> list[bool]:
        """None is."""
        return [False] * len(list(self._get_indices(indices)))


def head_inputs(observation: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """An observation of Stable-Baselines3's as heads take it: hidden (N, d), layer (N,), compute (N,), features."""
    layer, compute = observation["layer"].long().flatten(), observation["compute"].flatten()
    return observation["hidden"], layer, compute, observation.get("features")
