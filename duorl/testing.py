"""Checks of your own parts, like Gymnasium's `check_env`: each check raises an error that says what is wrong.

    duorl.testing.check_reward(MyReward())
    duorl.testing.check_router(MyRouter())
    duorl.testing.check_learner(MyLearner)
    duorl.testing.check_input(my_input)

They use a small model with random weights and take seconds. This module may import all others.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from duorl import envs
from duorl.costs import ACTIONS
from duorl.inputs import Input, View
from duorl.learners import Learner
from duorl.models import DuoForCausalLM, convert
from duorl.models.gateway import fresh_model
from duorl.rewards import Reward, Step, as_reward
from duorl.routed_pass import RoutedPass
from duorl.routers import RandomRouter, Router, load
from duorl.runs import checkpoints

_LAYERS, _HIDDEN, _VOCABULARY, _LENGTH = 3, 32, 61, 8


class CheckFailed(AssertionError):
    """The message says what is wrong with a part and what it should do."""


def _require(right: Any, message: str) -> None:
    if not right:
        raise CheckFailed(message)


@lru_cache(maxsize=1)
def small_model() -> DuoForCausalLM:
    """A frozen duo of 3 random Llama layers: hidden size 32, vocabulary 61."""
    sizes = {"hidden_size": _HIDDEN, "intermediate_size": 64, "num_hidden_layers": _LAYERS, "vocab_size": _VOCABULARY}
    config = AutoConfig.for_model("llama", num_attention_heads=4, max_position_embeddings=64, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = fresh_model(config)
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        duo = convert(model.eval(), small_ratio=4)
    return duo.eval().requires_grad_(False)


def small_windows(count: int = 6) -> Tensor:
    """Random windows for this model, (count, 9)."""
    return torch.randint(_VOCABULARY, (count, _LENGTH + 1), generator=torch.Generator().manual_seed(0))


def check_reward(reward: Reward | Callable[[Step], Tensor]) -> None:
    """Check a reward in some episodes.

    Raises:
        CheckFailed: it does not return one finite number per token, its `contextual` part has another shape, or it
            returns another value for the same step a second time.
    """
    reward = as_reward(reward)
    for actions in (("small", "big"), ACTIONS):
        first, second = (_episode(deepcopy(reward), actions) for _ in range(2))
        _require(torch.equal(first, second), f"{reward.name} must return the same rewards for the same step every time")


def _episode(reward: Reward, actions: tuple[str, ...]) -> Tensor:
    dynamics = envs.RoutingDynamics(small_model(), reward=reward, actions=actions)
    dynamics.reset(small_windows(2))
    generator, found = torch.Generator().manual_seed(0), list[Tensor]()
    while not dynamics.done:
        choice = torch.randint(len(actions), dynamics.compute.shape, generator=generator)
        try:
            found += [dynamics.step(choice), dynamics.contextual()]
        except (ValueError, RuntimeError, TypeError, AttributeError, AssertionError, NotImplementedError) as error:
            raise CheckFailed(f"{reward.name} fails in layer {dynamics.layer - 1}: {error}") from error
    return torch.stack(found)


def check_router(router: Router) -> None:
    """Check a router on a model with 3 layers and hidden size 32; also save it, load it and check it again.

    Raises:
        CheckFailed: it does not return one known action per token, stores something about passes, or decides
            differently after loading.
    """
    name, model, windows = type(router).__name__, small_model(), small_windows()
    _require(isinstance(router, Router), f"{name} must be a duorl.routers.Router")
    router.eval()
    before = _routes(deepcopy(router), model, windows)
    with tempfile.TemporaryDirectory() as folder:
        try:
            router.save_pretrained(folder)
            loaded = load(folder)
        except (TypeError, ValueError, RuntimeError) as error:
            message = "pass the constructor's arguments to super().__init__ as keywords"
            raise CheckFailed(f"{name} cannot be saved and loaded ({error}): {message}") from error
    _require(torch.equal(_routes(loaded, model, windows), before), f"{name} decides differently after loading")
    _routes(router, model, windows.flip(0))
    chance = any(isinstance(part, torch.Generator) for part in vars(router).values())
    message = f"{name} stores something about a pass on itself: read it from the view of the pass"
    _require(chance or torch.equal(_routes(router, model, windows), before), message)


@torch.no_grad()
def _routes(router: Router, model: DuoForCausalLM, windows: Tensor) -> Tensor:
    """Routes (B, T, L), checked layer by layer."""
    name = type(router).__name__
    router.begin(model, windows)
    walk, routes = RoutedPass(model, windows), []
    while not walk.done:
        actions = router.decide(walk.view)
        expected = tuple(walk.compute.shape)
        shape = tuple(getattr(actions, "shape", ()))
        _require(shape == expected, f"{name} must return one action per token, shape {expected}, not {shape}")
        _require(actions.dtype == torch.int64, f"{name} must return int64 action codes, not {actions.dtype}")
        known = (actions >= 0) & (actions < len(ACTIONS))
        _require(known.all(), f"{name} must return codes 0 skip, 1 small, 2 big, not {actions[~known][:1].tolist()}")
        routes.append(actions)
        walk.step(actions)
    return torch.stack(routes, dim=-1)


def check_learner(make: Callable[..., Learner], **options: Any) -> None:
    """Check a learner: train it, continue the training, and continue from every state that it saves.

    Args:
        make: the class; it is called with a `duorl.envs.Lockstep` and the options.
        options: options of its constructor.

    Raises:
        CheckFailed: one seed gives two results, its state cannot be saved, a second `learn` does nothing, a restored
            learner gives another result than an uninterrupted one, or its router is wrong (`check_router`).
    """
    name = getattr(make, "__name__", str(make))

    def learner() -> Learner:
        return make(envs.Lockstep(small_model(), small_windows(), windows_per_batch=2, group_size=2), **options)

    states: list[dict[str, Any]] = []
    first = learner()
    _require(isinstance(first, Learner), f"{name} must make a duorl.learners.Learner")
    total = 4 * first.decisions_per_update
    router = first.learn(total, lambda *_: states.append(deepcopy(first.state())))
    _require(states, f"{name} must make at least one update for {total} decisions")
    whole = _weights(router)
    _require(_same(_weights(learner().learn(total)), whole), f"{name} gives two results for one seed")
    for state in states:
        other = learner()
        other.restore(_kept(name, state))
        message = f"{name} goes on otherwise after restore: name in `stateful` what training changes"
        _require(_same(_weights(other.go_on()), whole), message)
    frozen = not any(parameter.requires_grad for parameter in router.parameters())
    _require(frozen, f"{name}.learn must return a frozen router")
    decisions = first.decisions
    first.learn(total)
    _require(first.decisions > decisions, f"{name}.learn does nothing when it is called again")
    check_router(first.router)


def _kept(name: str, state: dict[str, Any]) -> dict[str, Any]:
    """A state, saved and loaded."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.safetensors"
        try:
            checkpoints.save(path, state)
        except TypeError as error:
            raise CheckFailed(f"{name} has a state that cannot be saved: {error}") from error
        return checkpoints.load(path)


def _weights(router: Router) -> dict[str, Tensor]:
    return deepcopy(dict(router.state_dict()))


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def check_input(function: Input) -> None:
    """Check an input in every layer of a pass.

    Raises:
        CheckFailed: it does not return (..., k) finite numbers with the same k in every layer and for every shape of
            the tokens, or the numbers of a token depend on other tokens.
    """
    name = getattr(function, "__name__", type(function).__name__)
    router, walk, widths = RandomRouter(), RoutedPass(small_model(), small_windows(2)), set()
    while not walk.done:
        view = walk.view.by_token()
        found = function(view)
        expected = (*view.compute.shape, "k")
        shape = tuple(getattr(found, "shape", ()))
        _require(len(shape) == 2 and shape[0] == expected[0], f"{name} must return shape (..., k), not {shape}")
        _require(found.isfinite().all(), f"{name} returns numbers that are not finite, in layer {walk.layer}")
        alone = torch.cat([function(_only(view, token)) for token in range(len(view.compute))])
        _require(torch.allclose(alone, found, atol=1e-5), f"{name} mixes tokens: use each token alone")
        whole = function(walk.view)
        right = whole.shape[:-1] == walk.compute.shape and torch.allclose(whole.flatten(0, 1), found, atol=1e-5)
        _require(right, f"{name} must take tokens in any shape: (..., d) in, (..., k) out")
        widths.add(shape[1])
        walk.step(router.decide(walk.view))
    _require(len(widths) == 1, f"{name} must return the same number of values in every layer, not {sorted(widths)}")


def _only(view: View, token: int) -> View:
    one = slice(token, token + 1)
    return replace(
        view,
        hidden=view.hidden[one],
        compute=view.compute[one],
        previous=None if view.previous is None else view.previous[one],
        taken=tuple(actions[one] for actions in view.taken),
    )
