"""PPO, A2C and MaskablePPO of Stable-Baselines3 and sb3-contrib, with our policy and a group baseline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import sb3_contrib
import stable_baselines3
import torch
from sb3_contrib.common.maskable.distributions import MaskableCategoricalDistribution
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.distributions import CategoricalDistribution
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.torch_layers import CombinedExtractor
from torch import Tensor

from duorl import ranks
from duorl.agents.advantages import entropy, explained_variance
from duorl.agents.buffers import GroupRolloutBuffer, MaskableGroupRolloutBuffer
from duorl.agents.stable_baselines import StableBaselinesAgent
from duorl.checks import require_positive
from duorl.envs.lockstep import Lockstep
from duorl.envs.sb3 import head_inputs
from duorl.paths import RouterPath
from duorl.routers import HeadRouter
from duorl.routers.heads import LayerHeads, apply_heads


class _HeadPolicy(BasePolicy):
    """Actor-critic with a `HeadRouter` as actor and a value head per layer as critic.

    Args:
        router: the actor, trained in place.
        critic: heads with one output, trained in place.
        optimizer: optimizer of both.
        args, kwargs: arguments from Stable-Baselines3.
    """

    action_dist: Any
    choices: type[CategoricalDistribution] | type[MaskableCategoricalDistribution]

    def __init__(self, *args, router: HeadRouter, critic: LayerHeads, optimizer: torch.optim.Optimizer, **kwargs):
        self._parts = router, critic, optimizer
        kwargs["features_extractor_class"] = CombinedExtractor  # the default cannot take a Dict
        super().__init__(*args, **kwargs)

    def _build(self, lr_schedule) -> None:
        self.router, self.critic, self.optimizer = self._parts
        self.action_dist = self.choices(len(self.router.codes))

    def get_distribution(self, obs, action_masks=None) -> Any:
        """The distribution over the actions that are not masked."""
        return self._distribution(self.router.heads(*head_inputs(obs)), action_masks)

    def predict_values(self, obs) -> Tensor:
        """The critic's estimates, (N, 1)."""
        return self.critic(*head_inputs(obs))

    def forward(self, obs, deterministic: bool = False, action_masks=None) -> tuple[Tensor, Tensor, Tensor]:
        """Choices (N,), values (N, 1), log-probabilities (N,)."""
        distribution, values = self._both(obs, action_masks)
        choices = distribution.get_actions(deterministic=deterministic)
        return choices, values, distribution.log_prob(choices)

    def evaluate_actions(self, obs, actions: Tensor, action_masks=None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Values (N, 1), log-probabilities (N,) and entropies (N,) of past choices."""
        distribution, values = self._both(obs, action_masks)
        return values, distribution.log_prob(actions), distribution.entropy()

    def _both(self, obs, action_masks) -> tuple[Any, Tensor]:
        logits, values = apply_heads([self.router.heads, self.critic], *head_inputs(obs))
        return self._distribution(logits, action_masks), values

    def _distribution(self, logits: Tensor, action_masks) -> Any:
        distribution = self.action_dist.proba_distribution(action_logits=logits)
        if isinstance(distribution, MaskableCategoricalDistribution):
            distribution.apply_masking(action_masks)
        return distribution


class RoutingPolicy(_HeadPolicy, ActorCriticPolicy):
    """Policy for the PPO and A2C of Stable-Baselines3."""

    choices = CategoricalDistribution


class MaskableRoutingPolicy(_HeadPolicy, MaskableActorCriticPolicy):
    """Policy for the MaskablePPO of sb3-contrib."""

    choices = MaskableCategoricalDistribution


class _OnPolicy(StableBaselinesAgent):
    """Base of PPO, MaskablePPO and A2C.

    If the environment has K > 1 copies of each token, advantages are relative to the group.
    """

    algorithm: OnPolicyAlgorithm
    stateful = ("critic", *StableBaselinesAgent.stateful)

    def _shared(self, entropy_bonus: float, value_weight: float, gae_lambda: float) -> dict[str, Any]:
        """The arguments of Stable-Baselines3 that all three have."""
        self.critic = self.critic_heads()
        return {
            "env": self.vec_env,
            "n_steps": self.env.layers,
            "gamma": 1.0,
            "gae_lambda": gae_lambda,
            "ent_coef": entropy_bonus,
            "vf_coef": value_weight,
            "rollout_buffer_kwargs": {"group_size": self.env.group_size},
            "policy_kwargs": {"router": self.router, "critic": self.critic, "optimizer": self.optimizer},
            "device": self.env.model.device,
        }

    def measured(self) -> dict[str, float]:
        """Metrics of the rollout, for the policy that made it."""
        assert self.vec_env.outcome is not None
        buffer = cast(GroupRolloutBuffer, self.algorithm.rollout_buffer)
        values, returns = (torch.from_numpy(x).flatten() for x in (buffer.values, buffer.returns))
        with torch.no_grad():  # layer by layer, because heads make float32 copies of what they read
            steps = ({key: x[layer] for key, x in buffer.observations.items()} for layer in range(self.env.layers))
            logits = torch.cat([self.router.heads(*head_inputs(step)) for step in steps])
        if isinstance(buffer, MaskableGroupRolloutBuffer):
            logits = logits.masked_fill(~buffer.allowed.to(logits.device), -torch.inf)
        return {
            **self.vec_env.outcome.metrics(),
            "train/entropy": entropy(logits).mean().item(),
            "train/explained_variance": explained_variance(values, returns),
        }


class PPO(_OnPolicy):
    """Proximal policy optimization (Schulman et al. 2017) by Stable-Baselines3.

    Args:
        env: the environment; its seed also starts the weights and the sampled actions.
        learning_rate: learning rate of Adam; it falls linearly to 0.
        epochs: passes over a rollout.
        batch_size: decisions per gradient step, of all ranks together.
        clip_range: clip range of the probability ratio.
        gae_lambda: lambda of generalized advantage estimation; used only without copies.
        entropy_bonus: weight of the policy's entropy.
        value_weight: weight of the critic's squared error.
        width: hidden units of a head; 0 for linear heads.
        init: folder of a saved router to start from.

    Raises:
        ValueError: the environment has a hard budget; use MaskablePPO.
    """

    algorithm_class: type[OnPolicyAlgorithm] = stable_baselines3.PPO
    policy_class: type[_HeadPolicy] = RoutingPolicy
    buffer_class: type[GroupRolloutBuffer] = GroupRolloutBuffer

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
        init: RouterPath | None = None,
    ):
        super().__init__(env, learning_rate=learning_rate, width=width, init=init)
        require_positive(epochs=epochs)
        make: Callable[..., OnPolicyAlgorithm] = self.algorithm_class
        algorithm = make(
            self.policy_class,
            batch_size=max(1, min(batch_size, self.decisions_per_update) // ranks.count()),
            n_epochs=epochs,
            clip_range=clip_range,
            rollout_buffer_class=self.buffer_class,
            **self._shared(entropy_bonus, value_weight, gae_lambda),
        )
        self.start(algorithm)


class MaskablePPO(PPO):
    """PPO for hard budgets (Huang and Ontanon 2020), by sb3-contrib: actions that break the budget are masked.

    Args and errors as for `PPO`, but the environment may have `big_layers`.
    """

    algorithm_class = sb3_contrib.MaskablePPO
    policy_class = MaskableRoutingPolicy
    buffer_class = MaskableGroupRolloutBuffer
    honours = frozenset({"reward", "prices", "big_layers"})


class A2C(_OnPolicy):
    """Advantage actor-critic (Mnih et al. 2016) by Stable-Baselines3: one gradient step per rollout.

    Args:
        env: the environment; its seed also starts the weights and the sampled actions.
        learning_rate: learning rate of Adam; it falls linearly to 0.
        gae_lambda: lambda of generalized advantage estimation; used only without copies.
        entropy_bonus: weight of the policy's entropy.
        value_weight: weight of the critic's squared error.
        width: hidden units of a head; 0 for linear heads.
        init: folder of a saved router to start from.

    Raises:
        ValueError: the environment has a hard budget; use MaskablePPO.
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
        init: RouterPath | None = None,
    ):
        super().__init__(env, learning_rate=learning_rate, width=width, init=init)
        shared = self._shared(entropy_bonus, value_weight, gae_lambda)
        self.start(stable_baselines3.A2C(RoutingPolicy, rollout_buffer_class=GroupRolloutBuffer, **shared))


PPOAgent = PPO
