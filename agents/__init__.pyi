from .base import Agent
from .dqn import DQN, MEX
from .gflownet import GFlowNet
from .on_policy import A2C, PPO, MaskablePPO, PPOAgent
from .reinforce import REINFORCE, ReinforceAgent
from .reinmax import ReinMax

__all__ = [
    "A2C",
    "DQN",
    "MEX",
    "PPO",
    "REINFORCE",
    "Agent",
    "GFlowNet",
    "MaskablePPO",
    "PPOAgent",
    "ReinMax",
    "ReinforceAgent",
]
