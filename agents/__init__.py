"""Agents: what learns a router by reinforcement.

The command line knows them by their class's name, `--agent PPO`; in Python they are also `PPOAgent`, `ReinforceAgent`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
