"""PPO, A2C and MaskablePPO: Stable-Baselines3's own algorithms, with this project's policy and a group baseline."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import Any, cast

import numpy as np
import sb3_contrib
import stable_baselines3
import torch
from sb3_contrib.common.maskable.buffers import MaskableDictRolloutBuffer
from sb3_contrib.common.maskable.distributions import MaskableCategoricalDistribution
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.buffers import DictRolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import CategoricalDistribution
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.torch_layers import CombinedExtractor
from torch import Tensor

from agents.advantages import entropy, explained_variance, leave_one_out, rewards_to_go
from agents.base import Agent, Monitor, refuse_budget
from duorl.routers import HeadRouter
from duorl.routers.heads import LayerHeads
from envs.lockstep import Lockstep
from envs.sb3 import RoutingVecEnv, seen


class _HeadPolicy(BasePolicy):
    """Actor-critic with a `HeadRouter` as actor and a value head per layer as critic.

    Args:
        router: the actor, trained in place.
        critic: heads with one output, trained in place.
        args, kwargs: as Stable-Baselines3 gives them.
    """

    action_dist: Any
    choices: type[CategoricalDistribution] | type[MaskableCategoricalDistribution]

    def __init__(self, *args, router: HeadRouter, critic: LayerHeads, **kwargs):
        self._parts = router, critic
        kwargs["features_extractor_class"] = CombinedExtractor  # the default cannot take a Dict
        super().__init__(*args, **kwargs)

    def _build(self, lr_schedule) -> None:
        self.router, self.critic = self._parts
        self.action_dist = self.choices(len(self.router.codes))
        self.optimizer = torch.optim.Adam(self.parameters(), lr=lr_schedule(1))

    def get_distribution(self, obs, action_masks=None) -> Any:
        """The distribution over choices, without those that are ruled out."""
        distribution = self.action_dist.proba_distribution(action_logits=self.router.logits(*seen(obs)))
        if isinstance(distribution, MaskableCategoricalDistribution):
            distribution.apply_masking(action_masks)
        return distribution

    def predict_values(self, obs) -> Tensor:
        """The critic's estimates, (N, 1)."""
        return self.critic(*seen(obs))

    def forward(self, obs, deterministic: bool = False, action_masks=None) -> tuple[Tensor, Tensor, Tensor]:
        """Choices (N,), values (N, 1), log-probabilities (N,)."""
        distribution = self.get_distribution(obs, action_masks)
        choices = distribution.get_actions(deterministic=deterministic)
        return choices, self.predict_values(obs), distribution.log_prob(choices)

    def evaluate_actions(self, obs, actions: Tensor, action_masks=None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Values (N, 1), log-probabilities (N,) and entropies (N,) of past choices."""
        distribution = self.get_distribution(obs, action_masks)
        return self.predict_values(obs), distribution.log_prob(actions), distribution.entropy()


class RoutingPolicy(_HeadPolicy, ActorCriticPolicy):
    """For Stable-Baselines3's PPO and A2C."""

    choices = CategoricalDistribution


class MaskableRoutingPolicy(_HeadPolicy, MaskableActorCriticPolicy):
    """For sb3-contrib's MaskablePPO."""

    choices = MaskableCategoricalDistribution


class _GroupAdvantages(DictRolloutBuffer):
    """A rollout of whole episodes whose advantages are measured against the other copies of the same token.

    The leave-one-out mean of the group takes the critic's place in the advantage; it is unbiased and knows
    the token's own difficulty, which the critic has to guess.

    Args:
        group_size: K copies of each token; 1 keeps Stable-Baselines3's advantages (GAE).
        args, kwargs: as Stable-Baselines3 gives them.
    """

    def __init__(self, *args, group_size: int, **kwargs):
        self.group_size = group_size
        super().__init__(*args, **kwargs)

    def compute_returns_and_advantage(self, last_values: Tensor, dones: np.ndarray) -> None:
        """Fill `returns` and `advantages`, both (L, N)."""
        super().compute_returns_and_advantage(last_values, dones)
        if self.group_size > 1:
            returns = rewards_to_go(torch.from_numpy(self.rewards))
            self.advantages = (returns - leave_one_out(returns, self.group_size)).numpy()


class GroupRolloutBuffer(_GroupAdvantages):
    """For PPO and A2C."""


class MaskableGroupRolloutBuffer(_GroupAdvantages, MaskableDictRolloutBuffer):
    """For MaskablePPO."""


class _Report(BaseCallback):
    """Hands the monitor each rollout's metrics."""

    def __init__(self, env: RoutingVecEnv, monitor: Monitor | None):
        super().__init__()
        self.env, self.monitor = env, monitor

    @property
    def algorithm(self) -> OnPolicyAlgorithm:
        """The algorithm that calls back."""
        return cast(OnPolicyAlgorithm, self.model)

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        if self.monitor is None:
            return
        assert self.env.outcome is not None
        buffer = cast(DictRolloutBuffer, self.algorithm.rollout_buffer)
        policy = cast(RoutingPolicy, self.algorithm.policy)
        values, returns = (torch.from_numpy(x).flatten() for x in (buffer.values, buffer.returns))
        metrics = {
            **self.env.outcome.metrics(),
            "train/entropy": _mean_entropy(policy, buffer),
            "train/explained_variance": explained_variance(values, returns),
        }
        self.monitor(self.num_timesteps, metrics, policy.router)


@torch.no_grad()
def _mean_entropy(policy: RoutingPolicy, buffer: DictRolloutBuffer) -> float:
    """Mean entropy of the policy that made a rollout, in nats."""
    observations = {
        key: torch.as_tensor(values, device=policy.device).flatten(0, 1) for key, values in buffer.observations.items()
    }
    return entropy(policy.router.logits(*seen(observations))).mean().item()


class _OnPolicy(Agent):
    """What the three have in common: a rollout is one episode of all tokens, L steps of N environments.

    Where the environment holds K > 1 copies of each token, advantages are relative to the group.
    """

    algorithm: OnPolicyAlgorithm
    learning_rate: float

    def _shared(self, learning_rate: float, entropy_bonus: float, value_weight: float, gae_lambda: float) -> dict:
        """Arguments of Stable-Baselines3's that all three take."""
        env = self.env
        self.vec_env, self.learning_rate = RoutingVecEnv(env), learning_rate
        return {
            "env": self.vec_env,
            "learning_rate": learning_rate,
            "n_steps": env.layers,
            "gamma": 1.0,
            "gae_lambda": gae_lambda,
            "ent_coef": entropy_bonus,
            "vf_coef": value_weight,
            "rollout_buffer_kwargs": {"group_size": env.group_size},
            "policy_kwargs": {"router": self.router, "critic": self.heads(1)},
            "seed": env.first_seed,
            "device": env.model.device,
        }

    def learn(self, total_decisions: int, monitor: Monitor | None = None) -> HeadRouter:
        """Train; see `Agent.learn`."""
        self.algorithm.set_logger(Logger(folder=None, output_formats=[]))
        updates = ceil(total_decisions / self.decisions_per_update)
        # The algorithm asks after a rollout, when 1 / updates of the whole is already gone.
        self.algorithm.lr_schedule = lambda remaining: self.learning_rate * (remaining + 1 / updates)
        self.algorithm.set_random_seed(self.env.first_seed)
        self.algorithm.learn(updates * self.decisions_per_update, callback=_Report(self.vec_env, monitor))
        return self._finish()


class PPO(_OnPolicy):
    """Proximal policy optimization (Schulman et al. 2017) by Stable-Baselines3.

    Args:
        env: tokens in lockstep; its seed also starts the weights and the sampled actions.
        learning_rate: of Adam; falls linearly to 0.
        epochs: passes over a rollout.
        batch_size: decisions per gradient step.
        clip_range: of the probability ratio.
        gae_lambda: lambda of generalized advantage estimation, used without copies.
        entropy_bonus: weight of the policy's entropy.
        value_weight: weight of the critic's squared error.
        width: hidden units of a head; 0 for linear heads.
        init: folder of a saved router to start from.

    Raises:
        ValueError: the environment has a hard budget, which MaskablePPO keeps.
    """

    algorithm_class: type[OnPolicyAlgorithm] = stable_baselines3.PPO
    policy_class: type[_HeadPolicy] = RoutingPolicy
    buffer_class: type[_GroupAdvantages] = GroupRolloutBuffer
    takes_budgets = False

    def __init__(
        self,
        env: Lockstep,
        *,
        learning_rate: float = 3e-3,
        epochs: int = 2,
        batch_size: int = 4096,
        clip_range: float = 0.2,
        gae_lambda: float = 1.0,
        entropy_bonus: float = 0.0,
        value_weight: float = 0.5,
        width: int = 0,
        init: str | None = None,
    ):
        super().__init__(env, width, init)
        if not self.takes_budgets:
            refuse_budget(env, "PPO")
        make: Callable[..., OnPolicyAlgorithm] = self.algorithm_class
        self.algorithm = make(
            self.policy_class,
            batch_size=min(batch_size, self.decisions_per_update),
            n_epochs=epochs,
            clip_range=clip_range,
            rollout_buffer_class=self.buffer_class,
            **self._shared(learning_rate, entropy_bonus, value_weight, gae_lambda),
        )


class MaskablePPO(PPO):
    """PPO for hard budgets (Huang and Ontanon 2020), by sb3-contrib: choices that break the budget have no chance.

    Args and errors as for `PPO`, but the environment may have `big_layers`.
    """

    algorithm_class = sb3_contrib.MaskablePPO
    policy_class = MaskableRoutingPolicy
    buffer_class = MaskableGroupRolloutBuffer
    takes_budgets = True


class A2C(_OnPolicy):
    """Advantage actor-critic (Mnih et al. 2016) by Stable-Baselines3: one gradient step per rollout.

    Args:
        env: tokens in lockstep; its seed also starts the weights and the sampled actions.
        learning_rate: of Adam; falls linearly to 0.
        gae_lambda: lambda of generalized advantage estimation, used without copies.
        entropy_bonus: weight of the policy's entropy.
        value_weight: weight of the critic's squared error.
        width: hidden units of a head; 0 for linear heads.
        init: folder of a saved router to start from.

    Raises:
        ValueError: the environment has a hard budget, which MaskablePPO keeps.
    """

    def __init__(
        self,
        env: Lockstep,
        *,
        learning_rate: float = 1e-2,
        gae_lambda: float = 1.0,
        entropy_bonus: float = 0.0,
        value_weight: float = 0.5,
        width: int = 0,
        init: str | None = None,
    ):
        super().__init__(env, width, init)
        refuse_budget(env, "A2C")
        self.algorithm = stable_baselines3.A2C(
            RoutingPolicy,
            rollout_buffer_class=GroupRolloutBuffer,
            **self._shared(learning_rate, entropy_bonus, value_weight, gae_lambda),
        )
