"""Agents: what learns a router by reinforcement."""

from agents.base import Agent
from agents.ppo import PPOAgent
from agents.reinforce import ReinforceAgent

__all__ = ["Agent", "PPOAgent", "ReinforceAgent"]
