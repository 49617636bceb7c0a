"""RoutedPass against one full Hugging Face forward per question."""

import pytest
import torch
from conftest import FAMILIES, ROUTED_ONLY, make_duo, random_routes
from torch.nn.functional import cross_entropy

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


@pytest.mark.parametrize("family", FAMILIES)
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
