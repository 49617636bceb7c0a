"""Sample an episode of all tokens in lockstep, step by step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from duorl import ranks
from duorl.envs.lockstep import Lockstep
from duorl.envs.outcome import Outcome
from duorl.routers import HeadRouter
from duorl.routers.heads import LayerHeads


@dataclass(frozen=True)
class Episode:
    """One sampled route per token.

    Attributes:
        logits: (L, N, A), logits of the policy, -inf for masked actions.
        log_chosen: (L, N), log-probabilities of the chosen actions.
        values: (L, N), estimates of a critic; None without one.
        outcome: losses, rewards and routes of the episode.
    """

    logits: Tensor
    log_chosen: Tensor
    values: Tensor | None
    outcome: Outcome


def choose(shares: Tensor, generator: torch.Generator, copies: int) -> Tensor:
    """Draw an action per token, (N, 1), from shares (N, A) of the tokens (copies, B, T).

    The numbers are those that `torch.multinomial` draws for the tokens of all ranks; each rank takes its own.
    """
    tokens, actions = shares.shape
    noise = shares.new_empty(copies, ranks.count(), tokens // copies, actions).exponential_(generator=generator)
    return (shares / noise[:, ranks.rank()].flatten(0, 1)).argmax(-1, keepdim=True)


def sample(env: Lockstep, router: HeadRouter, generator: torch.Generator, critic: LayerHeads | None = None) -> Episode:
    """Draw the next windows and let the policy choose for every token; logits and values have gradients."""
    logits, log_chosen, values = [], [], []
    env.draw()
    while not env.done:
        state = env.hidden, env.layer, env.compute, env.features
        outputs = router.heads(*state).masked_fill(~env.action_masks(), -torch.inf)
        log_shares = torch.log_softmax(outputs, dim=-1)
        choice = choose(log_shares.detach().exp(), generator, env.group_size)
        logits.append(outputs)
        log_chosen.append(log_shares.gather(1, choice).squeeze(1))
        if critic is not None:
            values.append(critic(*state).squeeze(1))
        env.step(choice.squeeze(1))
    estimates = torch.stack(values) if values else None
    return Episode(torch.stack(logits), torch.stack(log_chosen), estimates, env.outcome)
