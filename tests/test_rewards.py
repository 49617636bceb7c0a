"""Rewards: their sums over an episode, and what shaping must not change."""

import pytest
import torch
from conftest import random_routes

from duorl.rewards import LogitLensShaping, LossImprovement, Reward, Step, Sum, price_of
from envs import RoutingDynamics


def play(model, tokens, reward, seed=0, context="routed"):
    """Random choices through one episode; returns the dynamics."""
    dynamics = RoutingDynamics(model, reward=reward, actions=("skip", "small", "big"), context=context)
    dynamics.reset(tokens)
    routes = random_routes(model, tokens, seed).flatten(0, 1)
    while not dynamics.done:
        dynamics.step(routes[:, dynamics.layer])
    return dynamics


@pytest.mark.parametrize("context", ["routed", "reference"])
def test_the_default_reward_sums_to_gain_minus_price_times_compute(duo, tokens, context):
    outcome = play(duo, tokens, LossImprovement(0.3), context=context).outcome
    assert torch.allclose(outcome.rewards.sum(0), outcome.gain - 0.3 * outcome.compute, atol=1e-6)
    assert torch.allclose(outcome.gain, play(duo, tokens, None, context=context).reference_loss - outcome.loss)


def test_shaping_leaves_every_return_unchanged(duo, tokens):
    for seed in range(3):
        plain = play(duo, tokens, LossImprovement(), seed).outcome.rewards
        shaped = play(duo, tokens, LossImprovement() + LogitLensShaping(0.5), seed).outcome.rewards
        assert torch.allclose(plain.sum(0), shaped.sum(0), atol=1e-5)
        assert not torch.allclose(plain, shaped)


def test_the_lens_loss_is_the_heads_on_the_layers_output(duo, tokens):
    seen = []

    class Look(Reward):
        def __call__(self, step):
            seen.append((step.lens_loss, step.next_hidden, step.loss))
            return torch.zeros_like(step.compute)

    play(duo, tokens, Look())
    for lens, hidden, _ in seen:
        logits = duo.stack.logits(hidden.view(2, 7, -1))
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        assert torch.allclose(lens, expected, atol=1e-6)
    assert torch.allclose(seen[-1][0], seen[-1][2])


def test_a_step_says_what_the_action_cost_and_did(duo, tokens):
    steps = []

    class Keep(Reward):
        def __call__(self, step):
            steps.append(step)
            return torch.zeros_like(step.compute)

    play(duo, tokens, Keep())
    assert [step.layer for step in steps] == [0, 1, 2]
    assert [step.last for step in steps] == [False, False, True]
    assert steps[0].previous is None and steps[2].previous is steps[1]
    for step in steps:
        assert torch.allclose(step.compute, duo.action_compute[step.layer][step.action], atol=1e-6)
        skipped = step.action == 0
        assert torch.equal(step.hidden[skipped], step.next_hidden[skipped])


def test_prices():
    assert price_of(Sum([LossImprovement(0.2), LogitLensShaping()])) == pytest.approx(0.2)
    assert price_of(LogitLensShaping()) == 0
    with pytest.raises(ValueError, match="price must be at least 0"):
        LossImprovement(-0.1)
    with pytest.raises(ValueError, match="at least one reward"):
        Sum([])


def test_only_what_a_reward_declares_is_credited_to_earlier_tokens(duo, tokens):
    class Nothing(Reward):
        def __call__(self, step):
            return torch.zeros_like(step.compute)

    for reward, credited in ((Nothing(), False), (LossImprovement(), True), (LossImprovement() + Nothing(), True)):
        dynamics = RoutingDynamics(duo, reward=reward, token_discount=0.5)
        dynamics.reset(tokens)
        while not dynamics.done:
            dynamics.step(torch.ones(14, dtype=torch.long))
        outcome = dynamics.outcome
        assert bool((outcome.credits != outcome.rewards).any()) is credited


def test_a_reward_of_the_wrong_shape_is_refused_by_name(duo, tokens):
    class Scalar(Reward):
        def __call__(self, step):
            return 1.0

    with pytest.raises(ValueError, match=r"Scalar must return one reward per token, shape \(N,\), not \(\)"):
        play(duo, tokens, Scalar())


def test_a_reward_without_a_call_says_so():
    with pytest.raises(NotImplementedError, match="Reward must define __call__"):
        Reward()(Step(0, *[torch.zeros(1)] * 4, last=False))
