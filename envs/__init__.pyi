from .dynamics import RoutingDynamics
from .gym_env import DuoRoutingEnv, DuoRoutingVectorEnv
from .lockstep import Lockstep
from .sb3 import RoutingVecEnv

__all__ = ["DuoRoutingEnv", "DuoRoutingVectorEnv", "Lockstep", "RoutingDynamics", "RoutingVecEnv"]
