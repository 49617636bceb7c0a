"""Environments: `duorl/Routing-v0` for Gymnasium, `RoutingVecEnv` for Stable-Baselines3, `Lockstep` for agents."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
