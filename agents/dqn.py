"""DQN and MEX learn action values (Q). The router's logits are the Q values, so its policy is the greedy one."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any, cast

import numpy as np
import stable_baselines3
import torch
from stable_baselines3.common.buffers import DictReplayBuffer
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.dqn.policies import DQNPolicy, QNetwork
from torch import Tensor
from torch.nn.functional import mse_loss

from duorl.agents.advantages import explained_variance, rewards_to_go
from duorl.agents.stable_baselines import StableBaselinesAgent
from duorl.checks import require_positive
from duorl.envs.lockstep import Lockstep
from duorl.envs.sb3 import head_inputs
from duorl.learners.base import State
from duorl.paths import RouterPath
from duorl.routers import HeadRouter


def epsilon_greedy_entropy(epsilon: float, actions: int) -> float:
    """Entropy in nats of an epsilon-greedy policy over A actions."""
    shares = [1 - epsilon + epsilon / actions] + [epsilon / actions] * (actions - 1)
    return -sum(share * math.log(share) for share in shares if share > 0)


def mex_loss(q: Tensor, chosen: Tensor, target: Tensor, eta: float) -> Tensor:
    """Mean of (Q(s, a) - target)^2 - eta * (max_b Q(s, b) - logsumexp_b Q(s, b)), a scalar.

    Maximize to Explore (Liu et al. 2023, arXiv 2305.18258) minimizes the error of the values and maximizes the value of
    the best action, in one objective. The logsumexp removes the common level of all actions.

    Args:
        q: (B, A), nats.
        chosen: (B,) int64, the actions that were taken.
        target: (B,), nats: reward + value of the next state.
        eta: weight of optimism; 0 for the squared error only.
    """
    error = mse_loss(q.gather(1, chosen[:, None]).squeeze(1), target)
    return error - eta * (q.amax(1) - q.logsumexp(1)).mean()


class _RouterQ(BasePolicy):
    """Q values of observations, (N, A): a router's logits."""

    def __init__(self, *spaces, router: HeadRouter):
        super().__init__(*spaces)
        self.router = router

    def forward(self, obs) -> Tensor:
        return self.router.heads(*head_inputs(obs))

    def _predict(self, observation, deterministic: bool = True) -> Tensor:
        return self(observation).argmax(1)


class RoutingQPolicy(DQNPolicy):
    """Policy for the DQN of Stable-Baselines3: a `HeadRouter`, and a copy of it as the target network.

    Args:
        router: trained in place.
        optimizer: optimizer of its weights.
        args, kwargs: arguments from Stable-Baselines3.
    """

    def __init__(self, *args, router: HeadRouter, optimizer: torch.optim.Optimizer, **kwargs):
        self._parts, self._optimizer = (router, deepcopy(router).requires_grad_(False)), optimizer
        super().__init__(*args, **kwargs)

    def _build(self, lr_schedule) -> None:
        spaces = self.observation_space, self.action_space
        networks = (cast(QNetwork, _RouterQ(*spaces, router=router)) for router in self._parts)
        self.q_net, self.q_net_target = networks
        self.optimizer = self._optimizer


class _HostReplay(DictReplayBuffer):
    """Keeps past decisions in the host's memory, also those of a model on a GPU."""

    def add(self, obs, next_obs, *decision: Any) -> None:
        here, there = ({key: values.cpu() for key, values in one.items()} for one in (obs, next_obs))
        super().add(here, there, *decision)


class _TokenDQN(stable_baselines3.DQN):
    """Every token explores independently, and values are means.

    In Stable-Baselines3, all environments of a step explore, or none. Its Huber loss estimates something between the
    mean and the median of returns that differ by more than 1, and the policy needs the mean.
    """

    agent: DQN
    eta = 0.0  # weight of MEX's optimism

    @property
    def epsilon(self) -> float:
        """Probability of a random action; 1 before learning starts."""
        if self.num_timesteps < self.learning_starts:
            return 1.0
        return self.exploration_schedule(1 - self.num_timesteps / self.agent.planned)

    @torch.no_grad()
    def _sample_action(self, learning_starts, action_noise=None, n_envs=1) -> tuple[np.ndarray, np.ndarray]:
        observation = cast(dict[str, Tensor], obs_as_tensor(cast(Any, self._last_obs), self.device))
        greedy = self.q_net(observation).argmax(1).cpu().numpy()
        random = self.agent.generator.integers(self.q_net.action_space.n, size=n_envs)
        choices = np.where(self.agent.generator.random(n_envs) < self.epsilon, random, greedy)
        return choices, choices

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        for _ in range(gradient_steps):
            self.policy.optimizer.zero_grad()
            self._loss(batch_size).backward()
            torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
            self.policy.optimizer.step()
        self._n_updates += gradient_steps

    def _loss(self, batch_size: int) -> Tensor:
        assert self.replay_buffer is not None
        batch = self.replay_buffer.sample(batch_size)
        with torch.no_grad():
            following = self.q_net_target(batch.next_observations).amax(1, keepdim=True)
            target = batch.rewards + (1 - batch.dones) * following
        return mex_loss(self.q_net(batch.observations), batch.actions.long().squeeze(1), target.squeeze(1), self.eta)


@torch.no_grad()
def _last_episode(algorithm: _TokenDQN, layers: int) -> tuple[Tensor, Tensor]:
    """Q values of the chosen actions in the last episode and their returns, both (L, N)."""
    buffer = cast(DictReplayBuffer, algorithm.replay_buffer)
    last = np.arange(buffer.pos - layers, buffer.pos) % buffer.buffer_size
    observations = {
        key: torch.as_tensor(values[last], device=algorithm.device).flatten(0, 1)
        for key, values in buffer.observations.items()
    }
    q = algorithm.q_net(observations).cpu().unflatten(0, (layers, -1))  # (L, N, A)
    chosen = torch.from_numpy(buffer.actions[last]).long()  # (L, N, 1)
    returns = rewards_to_go(torch.from_numpy(buffer.rewards[last]))
    return q.gather(2, chosen).squeeze(2), returns


class DQN(StableBaselinesAgent):
    """Deep Q-learning (Mnih et al. 2015) by Stable-Baselines3, undiscounted: Q(s, a) = r + max_b Q(s', b).

    After every episode of all tokens, DQN makes `gradient_steps` steps on past decisions. Each decision of each token
    is random with probability epsilon. `train/entropy` is the entropy of this epsilon-greedy policy.
    `train/explained_variance` says how well the Q values of all chosen actions, also random ones, predict the returns.

    Args:
        env: the environment; its seed also starts the weights, the exploration and the sampled batches.
        learning_rate: learning rate of Adam; it falls linearly to 0.
        buffer_size: number of decisions in the replay buffer, in whole episodes of all tokens and at least one
            episode; a decision takes 8 * hidden_size bytes.
        batch_size: decisions per gradient step.
        gradient_steps: gradient steps per episode of all tokens.
        target_interval: episodes of all tokens after which the router is copied to the target network.
        learning_starts: number of random decisions before the first gradient step.
        exploration_fraction: share of the decisions in which epsilon falls linearly from 1.
        exploration_final: epsilon after that.
        width: hidden units of a head; 0 for linear heads.
        init: folder of a saved router to start from; its logits are the first Q values.

    Raises:
        ValueError: the environment has a hard budget.
    """

    algorithm: _TokenDQN
    stateful = ("target", "generator", "replay", *StableBaselinesAgent.stateful)

    def __init__(
        self,
        env: Lockstep,
        *,
        learning_rate: float = 3e-3,
        buffer_size: int = 100_000,
        batch_size: int = 4096,
        gradient_steps: int = 16,
        target_interval: int = 1,
        learning_starts: int = 0,
        exploration_fraction: float = 0.5,
        exploration_final: float = 0.05,
        width: int = 0,
        init: RouterPath | None = None,
    ):
        super().__init__(env, learning_rate=learning_rate, width=width, init=init)
        counts = {"buffer_size": buffer_size, "gradient_steps": gradient_steps, "target_interval": target_interval}
        require_positive(**counts, batch_size=batch_size)
        self.generator = np.random.default_rng(env.first_seed)
        episode = self.own_decisions
        algorithm = _TokenDQN(
            RoutingQPolicy,
            self.vec_env,
            buffer_size=max(buffer_size // episode, 1) * episode,
            learning_starts=learning_starts,
            batch_size=batch_size,
            gamma=1.0,
            train_freq=env.layers,
            gradient_steps=gradient_steps,
            replay_buffer_class=_HostReplay,
            # The buffer has the next episode's first state in place of the final one; `done` makes its value 0.
            replay_buffer_kwargs={"handle_timeout_termination": False},
            target_update_interval=target_interval * episode,
            exploration_fraction=exploration_fraction,
            exploration_final_eps=exploration_final,
            policy_kwargs={"router": self.router, "optimizer": self.optimizer},
            device=env.model.device,
        )
        algorithm.agent = self
        self.start(algorithm)

    def measured(self) -> dict[str, float]:
        """Metrics of the last episode, by tag."""
        assert self.vec_env.outcome is not None
        values, returns = _last_episode(self.algorithm, self.env.layers)
        return {
            **self.vec_env.outcome.metrics(),
            "train/entropy": epsilon_greedy_entropy(self.algorithm.epsilon, len(self.env.codes)),
            "train/explained_variance": explained_variance(values.flatten(), returns.flatten()),
        }

    def charge(self, price: float) -> None:
        """Change the price, and delete the decisions that have rewards at the old price."""
        super().charge(price)
        cast(DictReplayBuffer, self.algorithm.replay_buffer).reset()

    @property
    def target(self) -> torch.nn.Module:
        """The target network."""
        return cast(_RouterQ, self.algorithm.q_net_target).router

    @property
    def replay(self) -> State:
        """Content of the replay buffer."""
        buffer = cast(DictReplayBuffer, self.algorithm.replay_buffer)
        held = slice(None) if buffer.full else slice(buffer.pos)
        columns = {name: getattr(buffer, name)[held] for name in _COLUMNS}
        states = {name: {key: x[held] for key, x in getattr(buffer, name).items()} for name in _STATES}
        return {"pos": buffer.pos, "full": buffer.full, "columns": columns, "states": states}

    @replay.setter
    def replay(self, state: State) -> None:
        buffer = cast(DictReplayBuffer, self.algorithm.replay_buffer)
        buffer.pos, buffer.full = state["pos"], state["full"]
        for name, values in state["columns"].items():
            getattr(buffer, name)[: len(values)] = values
        for name, parts in state["states"].items():
            for key, values in parts.items():
                getattr(buffer, name)[key][: len(values)] = values


_COLUMNS, _STATES = ("actions", "rewards", "dones"), ("observations", "next_observations")


class MEX(DQN):
    """Maximize to Explore (Liu et al. 2023): DQN with an optimistic loss, see `mex_loss`.

    Args:
        env: as for `DQN`.
        eta: weight of optimism; it raises the best action by about this many nats. 0: no optimism.
        options: as for `DQN`.

    Raises:
        ValueError: the environment has a hard budget.
    """

    def __init__(self, env: Lockstep, *, eta: float = 1e-3, **options: Any):
        super().__init__(env, **options)
        self.algorithm.eta = eta
