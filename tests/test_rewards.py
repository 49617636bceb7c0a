"""Rewards: their sums over an episode, and what shaping must not change."""

import pytest
import torch
from conftest import random_routes

from duorl.envs import RoutingDynamics
from duorl.envs.credit import Credit
from duorl.rewards import (
    Acceptance,
    FunctionReward,
    LogitLensShaping,
    LossImprovement,
    RedundancyCharge,
    Reward,
    Step,
    Sum,
    TeacherKL,
    is_contextual,
    price_of,
    with_price,
)


def play(model, tokens, reward, seed=0, context="routed", routes=None, price=None, **options):
    """One episode along (N, L) routes, random ones unless given; returns the dynamics."""
    dynamics = RoutingDynamics(model, reward=reward, actions=("skip", "small", "big"), context=context, **options)
    dynamics.reset(tokens, price=price)
    routes = random_routes(model, tokens, seed).flatten(0, 1) if routes is None else routes
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

    for reward in (LossImprovement(), LossImprovement() + Nothing()):
        dynamics = RoutingDynamics(duo, reward=reward)
        dynamics.reset(tokens)
        while not dynamics.done:
            dynamics.step(torch.ones(14, dtype=torch.long))
            expected = dynamics.outcome.gain if dynamics.done else torch.zeros(14)
            assert torch.equal(dynamics.contextual(), expected)
    assert is_contextual(LossImprovement() + Nothing()) and not is_contextual(Nothing())


def test_a_reward_of_the_wrong_shape_is_refused_by_name(duo, tokens):
    class Scalar(Reward):
        def __call__(self, step):
            return 1.0

    with pytest.raises(ValueError, match=r"Scalar must return one reward per token, shape \(N,\), not float"):
        play(duo, tokens, Scalar())


def test_a_reward_that_is_no_number_is_refused_by_name_and_layer(duo, tokens):
    class Infinite(Reward):
        def __call__(self, step):
            return torch.full_like(step.compute, torch.inf if step.layer == 1 else 0.0)

    with pytest.raises(ValueError, match="Infinite returned a reward that is not finite, in layer 1"):
        play(duo, tokens, Infinite())


def test_a_plain_function_is_a_reward(duo, tokens):
    def thrifty(step):
        return step.gain - 0.3 * step.compute

    outcome = play(duo, tokens, thrifty).outcome
    assert torch.equal(outcome.rewards, play(duo, tokens, LossImprovement(0.3)).outcome.rewards)
    assert play(duo, tokens, lambda step: step.action == 1).outcome.rewards.dtype == torch.float32
    for wrong in (3, LossImprovement):
        with pytest.raises(ValueError, match="a Reward or a function of a step"):
            play(duo, tokens, wrong)


def test_every_part_of_a_sum_has_its_own_curve(duo, tokens):
    def bonus(step):
        return 0.5 * (step.action == 1)

    outcome = play(duo, tokens, LossImprovement(0.3) + LogitLensShaping() + FunctionReward(bonus)).outcome
    metrics = outcome.metrics()
    small = (outcome.routes == 1).float().mean().item() * 3
    assert metrics["reward/bonus"] == pytest.approx(0.5 * small)
    assert metrics["reward/LogitLensShaping"] == pytest.approx(0, abs=1e-5)
    parts = sum(value for tag, value in metrics.items() if tag.startswith("reward/"))
    assert parts == pytest.approx(metrics["rollout/return"], abs=1e-5)
    twice = play(duo, tokens, Sum([LossImprovement(0.1), LossImprovement(0.2)])).outcome.metrics()
    assert twice["reward/LossImprovement"] > twice["reward/LossImprovement-2"]
    assert not any(tag.startswith("reward/") for tag in play(duo, tokens, None).outcome.metrics())


def test_a_reward_without_a_call_says_so():
    with pytest.raises(NotImplementedError, match="Reward must define __call__"):
        Reward()(Step(0, *[torch.zeros(1)] * 4, last=False))


def naive_log_probabilities(model, tokens, routes, position=None):
    """By the model's own forward, (B, T, V): routes for all tokens, or for one position and all-big elsewhere."""
    if position is not None:
        routes, chosen = torch.full_like(routes, 2), routes[:, position]
        routes[:, position] = chosen
    return model(input_ids=tokens[:, :-1], routes=routes).logits.log_softmax(-1)


def naive_predictions(model, tokens, routes, context):
    """Log probabilities of the routes and of all-big, (B, T, V) each: in the reference context a pass per position."""
    teacher = naive_log_probabilities(model, tokens, torch.full_like(routes, 2))
    positions = range(tokens.shape[1] - 1)
    if context == "routed":
        return naive_log_probabilities(model, tokens, routes), teacher
    each = [naive_log_probabilities(model, tokens, routes, position)[:, position] for position in positions]
    return torch.stack(each, dim=1), teacher


def naive_distance(model, tokens, routes, context):
    """KL(all-big || routes), (B, T)."""
    student, teacher = naive_predictions(model, tokens, routes, context)
    return (teacher.exp() * (teacher - student)).sum(-1)


@pytest.mark.parametrize("context", ["routed", "reference"])
def test_the_teacher_gain_is_the_naive_one(duo, tokens, context):
    """Of two copies with a route each; the reference route is all-small."""
    first, second = random_routes(duo, tokens, 0), random_routes(duo, tokens, 1)
    routes = torch.stack([first, second]).flatten(0, 2)
    earned = play(duo, tokens, TeacherKL(0.0), context=context, routes=routes, group_size=2).outcome.rewards
    reference = naive_distance(duo, tokens, torch.ones_like(first), context)
    expected = [reference - naive_distance(duo, tokens, each, context) for each in (first, second)]
    assert torch.allclose(earned[-1], torch.stack(expected).flatten(), atol=1e-5)
    assert (earned[:-1] == 0).all() and earned[-1].abs().max() > 0.01


@pytest.mark.parametrize("context", ["routed", "reference"])
def test_all_big_closes_the_whole_distance_to_itself_and_the_reference_none(duo, tokens, context):
    big, small = (torch.full((14, 3), action) for action in (2, 1))
    distance = naive_distance(duo, tokens, torch.ones_like(random_routes(duo, tokens)), context).flatten()
    won = play(duo, tokens, TeacherKL(0.0), context=context, routes=big).outcome.rewards.sum(0)
    assert torch.allclose(won, distance, atol=1e-5)
    none = play(duo, tokens, TeacherKL(0.0), context=context, routes=small).outcome.rewards.sum(0)
    assert torch.allclose(none, torch.zeros(14), atol=1e-5)


def test_the_teachers_share_leads_from_the_label_to_the_teacher(duo, tokens):
    plain = play(duo, tokens, LossImprovement(0.3)).outcome.rewards
    label, half, teacher = (play(duo, tokens, TeacherKL(0.3, share)).outcome.rewards for share in (0.0, 0.5, 1.0))
    assert torch.equal(label, plain)
    assert torch.allclose(half, (label + teacher) / 2, atol=1e-6)
    assert not torch.allclose(label, teacher)
    with pytest.raises(ValueError, match=r"share must be in \[0, 1\], not 1.5"):
        TeacherKL(share=1.5)


def test_the_teachers_gain_is_credited_to_earlier_tokens(duo, tokens):
    dynamics = play(duo, tokens, TeacherKL(0.0))
    gains = dynamics.outcome.rewards[-1].view(2, 7)
    owed = Credit(dynamics.reward, token_discount=0.5)(dynamics).view(2, 7)
    assert torch.allclose(owed[:, -2], 0.5 * gains[:, -1], atol=1e-6)
    assert torch.allclose(owed[:, 0], sum(0.5**s * gains[:, s] for s in range(1, 7)), atol=1e-6)


@pytest.mark.parametrize("context", ["routed", "reference"])
@pytest.mark.parametrize("sampled", [False, True])
def test_acceptance_is_that_of_speculative_decoding(duo, tokens, context, sampled):
    """Greedy: the most likely token is all-big's. Sampled: a token of the draft, drawn, is kept with min(1, p / q)."""

    def accepted(routes):
        draft, big = (log_shares.exp() for log_shares in naive_predictions(duo, tokens, routes, context))
        if sampled:
            return (draft * (big / draft).clamp(max=1)).sum(-1)
        return (draft.argmax(-1) == big.argmax(-1)).float()

    first, second = random_routes(duo, tokens, 0), random_routes(duo, tokens, 1)
    routes = torch.stack([first, second]).flatten(0, 2)
    outcome = play(duo, tokens, Acceptance(0.3, sampled), context=context, routes=routes, group_size=2).outcome
    gains = [accepted(each) - accepted(torch.ones_like(first)) for each in (first, second)]
    expected = torch.stack(gains).flatten() - 0.3 * outcome.compute
    assert torch.allclose(outcome.rewards.sum(0), expected, atol=1e-5)
    assert gains[0].abs().max() > 0.01


def test_what_ran_and_hardly_changed_the_state_is_charged():
    """|h| = 5 and |dh| = 0.4 is a relative update of 0.08, |dh| = 0.6 one of 0.12."""
    hidden = torch.tensor([[3.0, 4.0]]).repeat(4, 1)
    moved = torch.tensor([[0.0, 0.0], [0.0, 0.4], [0.4, 0.0], [0.6, 0.0]])
    step = Step(0, torch.tensor([0, 1, 2, 2]), torch.zeros(4), hidden, hidden + moved, last=False)
    assert torch.allclose(step.relative_update, torch.tensor([0.0, 0.08, 0.08, 0.12]), atol=1e-6)
    assert RedundancyCharge(0.5, threshold=0.1)(step).tolist() == [0, -0.5, -0.5, 0]
    assert RedundancyCharge(0.5, threshold=0.2)(step).tolist() == [0, -0.5, -0.5, -0.5]


def test_a_price_is_set_on_a_copy():
    original = LossImprovement(0.1) + LogitLensShaping()
    reward, set_price = with_price(original)
    set_price(0.4)
    assert price_of(reward) == pytest.approx(0.4) and price_of(original) == pytest.approx(0.1)
    set_price(torch.tensor([0.0, 0.5]))
    step = Step(0, torch.tensor([2, 2]), torch.tensor([0.5, 0.5]), *[torch.zeros(2, 1)] * 2, last=False)
    assert reward.rewards[0](step).tolist() == [0, -0.25]


def test_there_must_be_one_price_to_vary(duo):
    with pytest.raises(ValueError, match="LogitLensShaping has no prices"):
        with_price(LogitLensShaping())
    with pytest.raises(ValueError, match="Sum has 2 prices"):
        with_price(LossImprovement() + TeacherKL())
    with pytest.raises(ValueError, match="RedundancyCharge has no prices"):
        RoutingDynamics(duo, reward=RedundancyCharge(), prices=(0.1, 0.5))


@pytest.mark.parametrize("reward", [LossImprovement(7.0), LossImprovement(7.0) + RedundancyCharge(0.0)])
def test_each_token_is_charged_its_own_windows_price(duo, tokens, reward):
    """Copies share their window's price, and the reward that was given keeps its own."""
    routes = random_routes(duo, torch.cat([tokens, tokens])).flatten(0, 1)
    options = {"group_size": 2, "prices": (0.1, 0.5), "price": torch.tensor([0.1, 0.5])}
    outcome = play(duo, tokens, reward, routes=routes, **options).outcome
    price = torch.tensor([0.1] * 7 + [0.5] * 7).repeat(2)
    assert torch.allclose(outcome.rewards.sum(0), outcome.gain - price * outcome.compute, atol=1e-6)
    assert price_of(reward) == 7


@pytest.mark.parametrize("reward", [LossImprovement(0.3), TeacherKL(0.3), LossImprovement(0.3) + LogitLensShaping()])
def test_a_reward_of_losses_has_derivatives_where_a_step_is_given_weights(duo, tokens, reward):
    """More than the price's, at all-small: at all-big the distance to the teacher is least and has none."""
    dynamics = RoutingDynamics(duo, reward=reward)
    dynamics.reset(tokens)
    small = torch.tensor([1.0, 0.0]).repeat(14, 1)
    first = small.clone().requires_grad_()
    total = dynamics.step(torch.zeros(14, dtype=torch.long), first)
    while not dynamics.done:
        total = total + dynamics.step(torch.zeros(14, dtype=torch.long), small)
    (slopes,) = torch.autograd.grad(total.sum(), first)
    assert not torch.allclose(slopes, (-0.3 * duo.action_compute[0, 1:]).expand(14, 2), atol=1e-3)
