"""DuoRL: reinforcement-learning routers for language models with a big and a small FFN in every layer.

    model = duorl.load("duo-tiny")
    tokenizer = duorl.load_tokenizer("duo-tiny")
    tokens = duorl.load_windows(["stdlib-code"], tokenizer, split="evaluation", length=128)
    table = duorl.oracle.exhaustive(model, tokens[:4], context="reference", actions=("small", "big"))

The names are listed in `__init__.pyi`. Each is imported when it is first used, so `import duorl` is fast.
"""

import gymnasium
import lazy_loader

from duorl import auto

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

# By path, because the environments import torch. `gymnasium.make("duorl:duorl/Routing-v0")` imports this module.
gymnasium.register(
    "duorl/Routing-v0",
    entry_point="duorl.envs.gym_env:DuoRoutingEnv",
    vector_entry_point="duorl.envs.gym_env:DuoRoutingVectorEnv",
)

auto.register()
