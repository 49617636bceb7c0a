"""Base of the agents that use an algorithm of Stable-Baselines3."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger

from duorl import ranks
from duorl.agents.base import Agent
from duorl.envs.lockstep import Lockstep
from duorl.envs.sb3 import RoutingVecEnv
from duorl.learners.base import State

_COUNTERS = ("num_timesteps", "_n_updates", "_n_calls", "_episode_num")


class Randomness:
    """Gives one learner its own states of the global generators of NumPy and torch, which Stable-Baselines3 uses.

    Args:
        seed: seed of both.
        device: device of the torch generator.
    """

    def __init__(self, seed: int, device: torch.device):
        self._device = device
        self._numpy = np.random.RandomState(seed).get_state(legacy=False)
        self._torch = torch.Generator(device).manual_seed(seed).get_state()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Use these states inside the block; afterwards the global generators are as before."""
        outside = np.random.get_state()
        on_cuda = self._device.type == "cuda"
        with torch.random.fork_rng([self._device] if on_cuda else []):
            np.random.set_state(self._numpy)
            torch.cuda.set_rng_state(self._torch, self._device) if on_cuda else torch.set_rng_state(self._torch)
            try:
                if ranks.count() > 1:  # each draws numbers of its own, from seeds that all have
                    seeds = np.random.randint(2**31), int(torch.randint(2**31, (), device=self._device))
                    self._keep()
                    np.random.seed(seeds[0] + ranks.rank())
                    torch.manual_seed(seeds[1] + ranks.rank())
                yield
            finally:
                if ranks.count() == 1:
                    self._keep()
                np.random.set_state(outside)

    def _keep(self) -> None:
        """Keep the present states."""
        on_cuda = self._device.type == "cuda"
        self._numpy = np.random.get_state(legacy=False)
        self._torch = torch.cuda.get_rng_state(self._device) if on_cuda else torch.get_rng_state()

    def state(self) -> State:
        """The states of both generators."""
        return {"numpy": self._numpy, "torch": self._torch}

    def restore(self, state: State) -> None:
        """Set the states of both generators."""
        self._numpy, self._torch = state["numpy"], state["torch"]


class Report(BaseCallback):
    """Keeps the metrics of the last rollout, measured before the algorithm learns from it."""

    def __init__(self, agent: StableBaselinesAgent):
        super().__init__()
        self.agent = agent
        self.metrics: dict[str, float] = {}

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.metrics = self.agent.measured()


class StableBaselinesAgent(Agent):
    """An update is one call of the algorithm's own `learn`, for one episode of all tokens: L steps of N environments.

    Args:
        env: the environment.
        options: see `HeadLearner`.

    Attributes:
        vec_env: the environment for Stable-Baselines3.
        algorithm: set by `start`, which the subclass calls.
    """

    algorithm: BaseAlgorithm
    stateful: tuple[str, ...] = ("optimizer", "randomness", "counters")

    def __init__(self, env: Lockstep, **options):
        super().__init__(env, **options)
        self.vec_env = RoutingVecEnv(env, tensors=True)
        self.randomness = Randomness(env.first_seed, env.model.device)
        self._report = Report(self)

    def start(self, algorithm: BaseAlgorithm) -> None:
        """Set a new algorithm."""
        self.algorithm = algorithm
        algorithm.set_logger(Logger(folder=None, output_formats=[]))
        algorithm.lr_schedule = lambda _: self.rate
        parameters = self.optimizer.param_groups[0]["params"]
        self.optimizer.register_step_pre_hook(lambda *_: ranks.average_gradients(parameters))

    def span(self, total_decisions: int) -> int:
        """Whole updates."""
        return -(-total_decisions // self.decisions_per_update) * self.decisions_per_update

    @property
    def own_decisions(self) -> int:
        """Layer decisions of this rank in an update."""
        return self.decisions_per_update // ranks.count()

    def update(self) -> dict[str, float]:
        """Play one episode of all tokens and learn from it; returns the metrics by tag."""
        with self.randomness.in_use():
            learn: Any = self.algorithm.learn
            learn(self.own_decisions, callback=self._report, reset_num_timesteps=False, log_interval=None)
        return self._report.metrics

    def measured(self) -> dict[str, float]:
        """Metrics of the last rollout, by tag."""
        raise NotImplementedError

    @property
    def counters(self) -> dict[str, int]:
        """The counters of the algorithm."""
        return {name: getattr(self.algorithm, name) for name in _COUNTERS if hasattr(self.algorithm, name)}

    @counters.setter
    def counters(self, values: dict[str, int]) -> None:
        for name, value in values.items():
            setattr(self.algorithm, name, value)
        self.algorithm._last_obs = None  # the next update begins with new windows
