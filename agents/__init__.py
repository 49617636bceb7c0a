"""Agents: what learns a router by reinforcement.

The command line knows them by their class's name, `--agent PPO`; in Python they are also `PPOAgent`, `ReinforceAgent`.
"""

from agents.base import Agent
from agents.dqn import DQN, MEX
from agents.gflownet import GFlowNet
from agents.on_policy import A2C, PPO, MaskablePPO
from agents.reinforce import REINFORCE
from agents.reinmax import ReinMax

PPOAgent = PPO
ReinforceAgent = REINFORCE

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
