"""Environments: `duorl/Routing-v0` for Gymnasium, `RoutingVecEnv` for Stable-Baselines3, `Lockstep` underneath."""

import gymnasium

from envs.gym_env import DuoRoutingEnv, DuoRoutingVectorEnv
from envs.lockstep import Lockstep, RoutingDynamics
from envs.sb3 import RoutingVecEnv

gymnasium.register(
    "duorl/Routing-v0",
    entry_point="envs.gym_env:DuoRoutingEnv",
    vector_entry_point="envs.gym_env:DuoRoutingVectorEnv",
)

__all__ = ["DuoRoutingEnv", "DuoRoutingVectorEnv", "Lockstep", "RoutingDynamics", "RoutingVecEnv"]
