"""`Lockstep` as a `VecEnv` of Stable-Baselines3 with N = K * B * T tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from duorl.envs.gym_env import observation_space, observe, observe_tensors
from duorl.envs.lockstep import Lockstep
from duorl.envs.outcome import Outcome
from duorl.envs.places import checked_actions


class RoutingVecEnv(VecEnv):
    """Whole windows in lockstep for Stable-Baselines3's algorithms.

    All episodes end together, after L steps, and the next ones begin immediately. With group size K, the environments
    are K copies of the same B * T tokens, as (K, B, T).

    Args:
        lockstep: the tokens and the dynamics.
        tensors: return observations as tensors, not arrays, for algorithms with buffers of tensors. The last
            observation of an episode is not kept then: algorithms read it only if episodes are cut short.

    Attributes:
        outcome: outcome of the last finished episode; None before the first.
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
        """Set the actions (N,) of the next step."""
        self._actions = checked_actions(self.lockstep, actions)

    def step_wait(self):
        """Decide one layer; returns (observations, rewards, dones, infos) of Stable-Baselines3."""
        rewards = self.lockstep.step(self._actions.to(self.lockstep.codes.device)).float().cpu().numpy().copy()
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
        """Start the order of the windows again, with a seed."""
        self.lockstep.seed(seed or 0)
        return [seed] * self.num_envs

    def close(self) -> None:
        """Do nothing: there is nothing to close."""

    def get_attr(self, attr_name: str, indices=None) -> list[Any]:
        """The attribute, once per environment in `indices`."""
        return [getattr(self, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices=None) -> None:
        """Set an attribute, for all environments."""
        setattr(self, attr_name, value)

    def env_method(self, method_name: str, *args, indices=None, **kwargs) -> list[Any]:
        """Call `action_masks`, one (A,) per token. The tokens are rows of one batch and have no other methods."""
        if method_name != "action_masks":
            raise NotImplementedError(f"the tokens of a lockstep batch have no method {method_name!r}")
        return list(self.lockstep.action_masks().cpu().numpy())

    def has_attr(self, attr_name: str) -> bool:
        """Whether this object or its lockstep has the attribute."""
        return hasattr(self, attr_name) or hasattr(self.lockstep, attr_name)

    def env_is_wrapped(self, wrapper_class, indices=None) -> list[bool]:
        """False for all: no environment is wrapped."""
        return [False] * len(list(self._get_indices(indices)))


def head_inputs(observation: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Inputs of heads from an observation: hidden (N, d), layer (N,), compute (N,), features."""
    layer, compute = observation["layer"].long().flatten(), observation["compute"].flatten()
    return observation["hidden"], layer, compute, observation.get("features")
