"""Agents: learners that train a router by reinforcement learning.

On the command line, use the name of the class: `--agent PPO`. In Python, `PPOAgent` and `ReinforceAgent` are names too.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
