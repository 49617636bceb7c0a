"""Agents: what learns a router by reinforcement.

The command line knows them by their class's name, `--agent PPO`; in Python they are also `PPOAgent`, `ReinforceAgent`.
"""

from agents.base import Agent
from agents.ppo import PPO
from agents.reinforce import REINFORCE

PPOAgent = PPO
ReinforceAgent = REINFORCE

__all__ = ["PPO", "REINFORCE", "Agent", "PPOAgent", "ReinforceAgent"]
