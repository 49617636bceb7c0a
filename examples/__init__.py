"""Rewards to start your own from; see docs/rewards.md."""
