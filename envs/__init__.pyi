from .gym_env import DuoRoutingEnv, DuoRoutingVectorEnv
from .lockstep import Lockstep, RoutingDynamics
from .sb3 import RoutingVecEnv

__all__ = ["DuoRoutingEnv", "DuoRoutingVectorEnv", "Lockstep", "RoutingDynamics", "RoutingVecEnv"]
