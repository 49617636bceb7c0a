"""Agents: what learns a router by reinforcement.

The command line knows them by their class's name, `--agent PPO`; in Python they are also `PPOAgent`, `ReinforceAgent`.
"""

from agents.base import Agent
from agents.on_policy import A2C, PPO, MaskablePPO
from agents.reinforce import REINFORCE

PPOAgent = PPO
ReinforceAgent = REINFORCE

__all__ = ["A2C", "PPO", "REINFORCE", "Agent", "MaskablePPO", "PPOAgent", "ReinforceAgent"]
