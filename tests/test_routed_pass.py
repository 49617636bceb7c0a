"""RoutedPass against one full Hugging Face forward per question."""

import gc
import weakref

import pytest
import torch
from conftest import FAMILIES, LIKE_LLAMA, ROUTED_ONLY, VARIANTS, make_duo, random_routes
from torch.nn.functional import cross_entropy

from duorl.envs import RoutingDynamics
from duorl.models import footprint
from duorl.rewards import LogitLensShaping, LossImprovement, TeacherKL
from duorl.routed_pass import RoutedPass, remember


def routed_losses(model, tokens, routes):
    logits = model(input_ids=tokens[:, :-1], routes=routes).logits
    return cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(len(tokens), -1)


def reference_losses(model, tokens, routes):
    """Per token: a forward of its prefix, all-big but for the token itself."""
    losses = torch.empty(routes.shape[:2])
    for t in range(routes.shape[1]):
        mixed = torch.full_like(routes[:, : t + 1], 2)
        mixed[:, t] = routes[:, t]
        losses[:, t] = routed_losses(model, tokens[:, : t + 2], mixed)[:, -1]
    return losses


def walk_along(walk, routes):
    while not walk.done:
        walk.step(routes[..., walk.layer])
    return walk


@pytest.mark.parametrize("family", [*FAMILIES, *LIKE_LLAMA, *VARIANTS])
def test_both_contexts_equal_naive_computation(family, tokens):
    model = make_duo(family)
    routes = random_routes(model, tokens)
    for context, naive in (("routed", routed_losses), ("reference", reference_losses)):
        walk = walk_along(RoutedPass(model, tokens, context=context), routes)
        assert torch.allclose(walk.losses(), naive(model, tokens, routes), atol=1e-5), context


@pytest.mark.parametrize("family", ROUTED_ONLY)
def test_families_without_a_reference_context_have_routed_passes(family, tokens):
    model = make_duo(family)
    routes = random_routes(model, tokens)
    walk = walk_along(RoutedPass(model, tokens), routes)
    assert torch.allclose(walk.losses(), routed_losses(model, tokens, routes), atol=1e-5)
    with pytest.raises(ValueError, match="use context='routed'"):
        RoutedPass(model, tokens, context="reference")


def test_a_router_steers_the_layers_that_are_left(duo, tokens):
    routes = random_routes(duo, tokens)
    walk = RoutedPass(duo, tokens)
    walk.step(routes[..., 0])
    left = walk.steer(lambda view: routes[..., view.layer])
    assert torch.equal(left, routes[..., 1:]) and torch.equal(torch.stack(walk.view.taken, -1), routes)
    assert torch.allclose(walk.losses(), routed_losses(duo, tokens, routes), atol=1e-5)


def test_copies_are_independent_passes(duo, tokens):
    first, second = random_routes(duo, tokens, 1), random_routes(duo, tokens, 2)
    for context in ("routed", "reference"):
        both = walk_along(RoutedPass(duo, tokens, context=context, copies=2), torch.cat([first, second]))
        apart = [walk_along(RoutedPass(duo, tokens, context=context), routes).losses() for routes in (first, second)]
        assert torch.allclose(both.losses(), torch.cat(apart), atol=1e-5)


def test_scored_positions_equal_those_of_the_whole_window(duo, tokens):
    routes = random_routes(duo, tokens)
    everywhere = walk_along(RoutedPass(duo, tokens, context="reference"), routes).losses()
    positions = torch.tensor([[1, 6], [0, 3]])
    walk = RoutedPass(duo, tokens, context="reference", memory=remember(duo, tokens, positions))
    picked = routes.gather(1, positions[..., None].expand(-1, -1, duo.num_layers))
    assert torch.allclose(walk_along(walk, picked).losses(), everywhere.gather(1, positions), atol=1e-5)


def test_compute_is_the_sum_of_the_actions_taken(duo, tokens):
    routes = random_routes(duo, tokens)
    walk = walk_along(RoutedPass(duo, tokens), routes)
    expected = sum(duo.action_compute[layer][routes[..., layer]] for layer in range(duo.num_layers))
    assert torch.allclose(walk.compute, expected)


def test_a_one_hot_mixture_is_a_step(duo, tokens):
    routes = random_routes(duo, tokens)
    hard, soft = walk_along(RoutedPass(duo, tokens), routes), RoutedPass(duo, tokens)
    while not soft.done:
        soft.mix(torch.nn.functional.one_hot(routes[..., soft.layer], 3).float(), (0, 1, 2))
    assert torch.allclose(soft.losses(), hard.losses(), atol=1e-5)
    assert torch.allclose(soft.compute, hard.compute)


def test_branching_visits_every_route_in_counting_order(duo, tokens):
    for context in ("routed", "reference"):
        walk = RoutedPass(duo, tokens, context=context)
        while not walk.done:
            walk.branch((0, 2))
        losses, compute = walk.losses().view(8, *tokens[:, 1:].shape), walk.compute.view(8, *tokens[:, 1:].shape)
        for number in range(8):
            bits = [2 * (number >> place & 1) for place in (2, 1, 0)]
            one = RoutedPass(duo, tokens, context=context)
            for action in bits:
                one.take(action)
            assert torch.allclose(losses[number], one.losses(), atol=1e-5)
            assert torch.allclose(compute[number], one.compute)


def test_a_fork_goes_its_own_way(duo, tokens):
    walk = RoutedPass(duo, tokens)
    walk.take(1)
    fork = walk.fork()
    fork.take(2)
    assert (walk.layer, fork.layer) == (1, 2)
    for branch in (walk, fork):
        while not branch.done:
            branch.take(2)
    assert (walk.losses() - fork.losses()).abs().max() < 1e-6


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "gpt2", "bloom", "opt 350M"])
def test_derivatives_in_the_reference_context_are_the_naive_ones(family, tokens):
    """Per token: of a pass over its prefix in which all tokens but itself take big."""
    model = make_duo(family)
    shares = torch.rand(3, 2, 7, 2, generator=torch.Generator().manual_seed(0)).softmax(-1).requires_grad_()
    walk = RoutedPass(model, tokens, context="reference")
    while not walk.done:
        walk.mix(shares[walk.layer], (1, 2))
    losses = walk.losses()
    (found,) = torch.autograd.grad(losses.sum(), shares)
    for t in (0, 3, 6):
        own = shares[:, :, : t + 1].detach().clone()
        own[:, :, :t] = torch.tensor([0.0, 1.0])
        own.requires_grad_()
        prefix = RoutedPass(model, tokens[:, : t + 2])
        while not prefix.done:
            prefix.mix(own[prefix.layer], (1, 2))
        loss = prefix.losses()[:, -1]
        assert torch.allclose(loss, losses[:, t], atol=1e-5)
        (expected,) = torch.autograd.grad(loss.sum(), own)
        assert torch.allclose(found[:, :, t], expected[:, :, t], atol=1e-5)


def test_no_more_logits_are_held_than_fit_at_once(duo, tokens, monkeypatch):
    """Neither of the teacher or the copies, nor, for derivatives, of a pass that is over."""
    options = {"reward": TeacherKL(0.1) + LossImprovement(0.1), "group_size": 3}
    whole = played(duo, tokens, **options)
    monkeypatch.setattr(footprint, "_LEAST_ROWS", 8)
    monkeypatch.setattr(footprint, "_LOGITS_AT_ONCE", {"cpu": 8 * 61})
    made, kept = [], []
    head = duo.get_output_embeddings()
    monkeypatch.setattr(head, "forward", lambda x, own=head.forward: (made.append(x[..., 0].numel()), own(x))[1])
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(weakref.ref(x)), x)[1], lambda x: x):
        parts = played(duo, tokens, **options)
    still = [tensor.shape for ref in kept if (tensor := ref()) is not None]
    assert max(made) <= 8 and still and not any(shape and shape[-1] == 61 for shape in still)
    for one, other in zip(whole, parts, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def played(duo, tokens, **options):
    """Rewards of an episode of all-big and their derivatives."""
    dynamics = RoutingDynamics(duo, **options)
    dynamics.reset(tokens)
    choices = [torch.tensor([0.2, 0.8]).repeat(len(dynamics.compute), 1).requires_grad_() for _ in range(3)]
    earned = sum(dynamics.step(choice.argmax(1), choice) for choice in choices)
    return earned.detach(), *torch.autograd.grad(earned.sum(), choices)


def test_an_episode_holds_the_states_of_two_layers(duo, tokens):
    held = []

    class Watching(LogitLensShaping):
        def __call__(self, step):
            held.append(weakref.ref(step.hidden))
            assert step.previous is None or step.previous.previous is None
            return super().__call__(step)

    dynamics = RoutingDynamics(duo, reward=Watching())
    dynamics.reset(tokens)
    while not dynamics.done:
        dynamics.step(torch.ones(14, dtype=torch.long))
    gc.collect()
    assert [state() is None for state in held] == [True, False, False]
    assert dynamics.outcome.routes.shape == (14, 3)


def test_a_pass_that_would_be_random_or_too_long_is_refused(tokens):
    model = make_duo("gpt2")  # it has dropout
    long = torch.zeros(1, 66, dtype=torch.int64)
    for begin in (RoutedPass, remember):
        with pytest.raises(ValueError, match="a window of 65 tokens is longer than the model's 64 positions"):
            begin(model, long)
        with pytest.raises(ValueError, match=r"training mode, in which dropout is random: call model.eval\(\)"):
            begin(model.train(), tokens)
        model.eval()


def test_quantized_networks_are_run_and_counted():
    """They have no parameters, or packed ones."""
    model = make_duo("llama")
    before = model.flops.ffns
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    quantized.__dict__.pop("flops", None)  # to be counted again
    assert torch.equal(quantized.flops.ffns, before) and quantized.flops.head == model.flops.head
    tokens = torch.randint(61, (2, 33), generator=torch.Generator().manual_seed(0))
    losses = RoutedPass(quantized, tokens).take_all(2).losses()
    assert (losses - RoutedPass(model, tokens).take_all(2).losses()).abs().max() < 0.3
