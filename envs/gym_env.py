"""The Gymnasium environments: `duorl/Routing-v0`, one token or many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.error import ClosedEnvironmentError
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from duorl.checks import require_positive
from duorl.corpus import load_windows
from duorl.envs.dynamics import RoutingDynamics
from duorl.envs.order import WindowOrder
from duorl.envs.places import checked_actions, chosen_place, draw_place, drawn_route, objects, places_to_tensors
from duorl.models import check_windows, load, load_tokenizer
from duorl.models.footprint import Batch, require_room
from duorl.rewards import Reward, Step
from duorl.routed_pass import Context

if TYPE_CHECKING:
    from duorl.models import DuoForCausalLM


@lru_cache(maxsize=2)
def _load(name: str) -> DuoForCausalLM:
    return load(name)


@lru_cache(maxsize=2)
def _windows(name: str, corpus: tuple[str, ...], length: int) -> Tensor:
    return load_windows(corpus, load_tokenizer(name), split="router", length=length)


def observation_space(dynamics: RoutingDynamics) -> spaces.Dict:
    """The observation of one token; see `DuoRoutingEnv`."""
    entries: dict[str, spaces.Space] = {
        "hidden": spaces.Box(-np.inf, np.inf, (dynamics.model.hidden_size,), np.float32),
        "layer": spaces.Discrete(dynamics.layers + 1),
        "compute": spaces.Box(0.0, 1.0, (1,), np.float32),
    }
    if dynamics.num_features:
        entries["features"] = spaces.Box(-np.inf, np.inf, (dynamics.num_features,), np.float32)
    return spaces.Dict(entries)


def observe_tensors(dynamics: RoutingDynamics) -> dict[str, Tensor]:
    """The observations of N tokens: hidden (N, d), layer (N,), compute (N, 1), and features (N, C)."""
    hidden, compute = dynamics.hidden.detach().float(), dynamics.compute.detach().float()
    layer = torch.full((len(hidden),), dynamics.layer, device=hidden.device)
    batch = {"hidden": hidden, "layer": layer, "compute": compute[:, None].clamp(0.0, 1.0)}
    if (features := dynamics.features) is not None:
        batch["features"] = features.detach().float()
    return batch


def observe(dynamics: RoutingDynamics) -> dict[str, np.ndarray]:
    """The same as arrays, which wrappers may change: the episode does not read them."""
    return {key: values.cpu().numpy().copy() for key, values in observe_tensors(dynamics).items()}


def _build(
    model: DuoForCausalLM | str, windows: Tensor | None, corpus: Sequence[str], window: int, **options
) -> tuple[RoutingDynamics, Tensor]:
    if windows is None:
        if not isinstance(model, str):
            raise ValueError("a model given as an object has no tokenizer: give windows (W, T+1) with it")
        windows = _windows(model, tuple(corpus), window)
    loaded = _load(model) if isinstance(model, str) else model
    check_windows(loaded, windows)
    return RoutingDynamics(loaded, **options), windows


class DuoRoutingEnv(gymnasium.Env):
    r"""Route one token through a frozen duo model.

    ## Description
    A language model has two feed-forward networks (FFNs) in every layer, a big and a small one (Duo-LLM, arXiv
    2410.10846). An episode is one token of a text. In each layer, the agent decides whether the token uses the small
    network, the big one, or none. The tokens before it used the big network everywhere (context `reference`). So
    episodes do not depend on each other, and the exhaustive oracle is the exact optimum.

    ## Action Space
    `Discrete(A)`, an index into `actions`, cheapest first; by default 0 is small and 1 is big.

    ## Observation Space
    A `Dict`:

    | key | space | meaning |
    |---|---|---|
    | `hidden` | `Box(-inf, inf, (d,))` | input of this layer's FFN; after the last layer, the final residual stream |
    | `layer` | `Discrete(L + 1)` | index of the layer to decide; L at the end |
    | `compute` | `Box(0, 1, (1,))` | FLOPs in the FFNs so far, as a share of an all-big pass |
    | `features` | `Box(-inf, inf, (C,))` | with `inputs`: further inputs of a router, see `duorl.inputs` |

    ## Rewards
    `LossImprovement(price=0.1)`: the reward of each decision is -price * compute. The last decision also gets the
    token's reference loss (all-small, same context) minus its loss. The unit is nats. Any other `duorl.rewards.Reward`
    can be given, and a function of a step.

    ## Starting State
    A window and a position in it, drawn uniformly by the environment's generator, or given by
    `reset(options={"window": i, "position": t})`.

    ## Episode End
    Terminates after L steps; never truncates. The last `info` has `loss`, `gain`, `compute` and `route`.

    ## Arguments
    - `model`: an embedded model's name, a folder, or a frozen `DuoForCausalLM` (then `windows` too).
    - `windows`: (W, T+1) tokens; by default from `corpus`.
    - `corpus`, `window`: text of the router split, and tokens per window.
    - `reward`, `actions`, `reference`: see `duorl.envs.RoutingDynamics`.
    - `inputs`, `big_layers`: see there. With `big_layers=k`, exactly k layers must be big, and `action_masks()` says
      which actions still allow this.
    - `render_mode`: `"ansi"` draws the route so far, one character per layer: `.` skip, `s` small, `B` big.

    ## Version History
    - v0: first version.
    """

    metadata = {"render_modes": ["ansi"]}  # noqa: RUF012  (Gymnasium's protocol)

    def __init__(
        self,
        model: DuoForCausalLM | str = "duo-tiny",
        *,
        windows: Tensor | None = None,
        corpus: Sequence[str] = ("stdlib-code",),
        window: int = 128,
        reward: Reward | Callable[[Step], Tensor] | None = None,
        actions: Sequence[str] = ("small", "big"),
        reference: str = "small",
        inputs: Sequence[str] = (),
        big_layers: int | None = None,
        render_mode: Literal["ansi"] | None = None,
    ):
        self.dynamics, self.windows = _build(
            model,
            windows,
            corpus,
            window,
            reward=reward,
            actions=actions,
            context="reference",
            reference=reference,
            inputs=inputs,
            big_layers=big_layers,
        )
        require_room(self.dynamics.model, Batch(1, self.windows.shape[1] - 1), "lower window")
        self.observation_space = observation_space(self.dynamics)
        self.action_space = spaces.Discrete(len(self.dynamics.actions))
        self.render_mode = render_mode
        self._place = {"window": 0, "position": 0}
        self._route: list[str] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """Begin with another token; `options` may name its `window` and `position`."""
        super().reset(seed=seed)
        drawn = draw_place(self.windows, self.np_random)
        self._place = chosen_place(drawn, options)
        tokens, positions = places_to_tensors(self.windows, [self._place])
        self.dynamics.reset(tokens, positions)
        self._route = []
        return self._observation(), dict(self._place)

    def step(self, action):
        """Decide one layer; returns Gymnasium's (observation, reward, terminated, truncated, info)."""
        choice = checked_actions(self.dynamics, [action])
        reward = self.dynamics.step(choice)
        self._route.append(self.dynamics.actions[int(choice)])
        return self._observation(), float(reward), self.dynamics.done, False, self._info()

    def action_masks(self) -> np.ndarray:
        """(A,) bool: the actions that still allow the budget; the MaskablePPO of sb3-contrib calls this."""
        return self.dynamics.action_masks()[0].cpu().numpy()

    def render(self) -> str | None:
        """The route so far as text, e.g. `window 3 position 17: sBBs____`."""
        return None if self.render_mode is None else drawn_route(self._place, self._route, self.dynamics.layers)

    def _observation(self) -> dict[str, Any]:
        batch = observe(self.dynamics)
        return {**{key: values[0] for key, values in batch.items()}, "layer": np.int64(self.dynamics.layer)}

    def _info(self) -> dict[str, Any]:
        if not self.dynamics.done:
            return {}
        outcome = self.dynamics.outcome
        numbers = {name: float(getattr(outcome, name)) for name in ("loss", "gain", "compute")}
        return {**numbers, "route": list(self._route)}


class DuoRoutingVectorEnv(VectorEnv):
    """`DuoRoutingEnv` for many tokens in lockstep, one batched pass through the model.

    With `tokens_per_window=1` (the default) it is N independent `DuoRoutingEnv`s: token i, reset with seed s, is
    the single environment reset with seed s + i. With `tokens_per_window=T` it takes whole windows: num_envs
    must be a multiple of T * `group_size`. The context may then be `routed`: the tokens of a window read the keys and
    values of each other's routed passes, as in deployment.

    All episodes end together; the step that ends them returns the next episode's first observations and infos
    (autoreset mode SAME_STEP). As in Gymnasium, `infos["final_obs"]` then holds the last observations, (N,)
    dictionaries, and `infos["final_info"]` what the single environments' last `info` has, (N,) each: `loss`, `gain`,
    `compute` and `route`.
    Every key has a mask beside it, `_final_obs` for instance, (N,) bool.

    `reset(options={"window": i, "position": t})` begins all N with that token; whole windows take `window` alone.

    Args:
        num_envs: N tokens.
        tokens_per_window: 1, or T for whole windows.
        group_size: K copies of each window side by side, as (K, B, T) in the first axis.
        context: `reference`, or `routed` for whole windows.
        render_mode: `"ansi"` draws every token's route so far.

    The other arguments are those of `DuoRoutingEnv`.

    Raises:
        ValueError: num_envs has the wrong size, or the context needs whole windows, or a pass does not fit into memory.
    """

    metadata = {"render_modes": ["ansi"], "autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012  (the protocol)

    def __init__(
        self,
        num_envs: int = 1,
        model: DuoForCausalLM | str = "duo-tiny",
        *,
        tokens_per_window: int = 1,
        group_size: int = 1,
        context: Context = "reference",
        windows: Tensor | None = None,
        corpus: Sequence[str] = ("stdlib-code",),
        window: int = 128,
        reward: Reward | Callable[[Step], Tensor] | None = None,
        actions: Sequence[str] = ("small", "big"),
        reference: str = "small",
        inputs: Sequence[str] = (),
        big_layers: int | None = None,
        render_mode: Literal["ansi"] | None = None,
    ):
        options: dict[str, Any] = {"reward": reward, "actions": actions, "reference": reference, "context": context}
        options |= {"inputs": inputs, "big_layers": big_layers, "group_size": group_size}
        self.dynamics, self.windows = _build(model, windows, corpus, window, **options)
        length = self.windows.shape[1] - 1
        require_positive(num_envs=num_envs, group_size=group_size)
        if tokens_per_window not in (1, length):
            raise ValueError(f"tokens_per_window must be 1 or the window's {length}, not {tokens_per_window}")
        if context == "routed" and tokens_per_window != length:
            raise ValueError(f"context 'routed' routes whole windows: give tokens_per_window={length}")
        if num_envs % (tokens_per_window * group_size):
            raise ValueError(f"num_envs must be a multiple of {tokens_per_window * group_size}, not {num_envs}")
        self.num_envs, self.render_mode = num_envs, render_mode
        self.group_size, self.whole_windows = group_size, tokens_per_window == length
        self.batch = num_envs // (tokens_per_window * group_size)
        # Single tokens read an all-big pass of their window, and have few scores of their own.
        taken = Batch(num_envs // tokens_per_window, length, context=context if self.whole_windows else "routed")
        require_room(self.dynamics.model, taken, f"lower num_envs ({num_envs})")
        self.single_observation_space = observation_space(self.dynamics)
        self.single_action_space = spaces.Discrete(len(self.dynamics.actions))
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._generators: list[np.random.Generator] = []
        self._routes: list[np.ndarray] = []

    def reset(self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None):
        """Begin N episodes; token i has the seed `seed + i`, or seed i if N seeds are given."""
        self._require_open()
        if options and "reset_mask" in options and not np.all(options["reset_mask"]):
            raise ValueError("reset_mask: all tokens are in one layer, so that they begin together or not at all")
        if seed is not None or not self._generators:
            self._seed(seed)
        self._draw(options)
        return observe(self.dynamics), self._masked(self._place)

    def step(self, actions):
        """Decide one layer for all N tokens; actions (N,)."""
        self._require_open()
        choice = checked_actions(self.dynamics, actions)
        rewards = self.dynamics.step(choice).cpu().numpy().astype(np.float64)
        self._routes.append(choice.numpy())
        ended = np.full(self.num_envs, self.dynamics.done)
        infos: dict[str, Any] = {}
        if self.dynamics.done:
            final = {"final_obs": self._final_observations(), "final_info": self._final_info()}
            self._draw()
            infos = self._masked({**final, **self._place})
        return observe(self.dynamics), rewards, ended, np.zeros_like(ended), infos

    def action_masks(self) -> np.ndarray:
        """(N, A) bool: the actions from which the budget can still be met."""
        return self.dynamics.action_masks().cpu().numpy()

    def render(self) -> tuple[str, ...] | None:  # type: ignore[override]
        """Every token's route so far, as the single environment draws it."""
        if self.render_mode is None:
            return None
        layers, places = self.dynamics.layers, zip(*self._place.values(), strict=True)
        routes = self._route_names() if self._routes else [[] for _ in range(self.num_envs)]
        named = (dict(zip(self._place, place, strict=True)) for place in places)
        return tuple(drawn_route(place, route, layers) for place, route in zip(named, routes, strict=True))

    def _require_open(self) -> None:
        if self.closed:
            raise ClosedEnvironmentError("the environment is closed: make another")

    def _masked(self, infos: dict[str, Any]) -> dict[str, Any]:
        """Infos as Gymnasium batches them: beside each the mask of the environments that have it, here all or none."""
        return {key: value for name in infos for key, value in ((name, infos[name]), (f"_{name}", self._all()))}

    def _all(self) -> np.ndarray:
        return np.ones(self.num_envs, dtype=bool)

    def _route_names(self) -> list[list[str]]:
        return [[self.dynamics.actions[index] for index in route] for route in np.stack(self._routes, axis=1)]

    def _final_observations(self) -> np.ndarray:
        final = observe(self.dynamics)
        return objects({key: values[i] for key, values in final.items()} for i in range(self.num_envs))

    def _final_info(self) -> dict[str, Any]:
        outcome = self.dynamics.outcome
        numbers = {name: getattr(outcome, name).double().cpu().numpy() for name in ("loss", "gain", "compute")}
        return self._masked({**numbers, "route": objects(self._route_names())})

    def _seed(self, seed: int | Sequence[int | None] | None) -> None:
        if seed is None or isinstance(seed, int | np.integer):
            seeds = [None if seed is None else int(seed) + i for i in range(self.num_envs)]
        else:
            seeds = list(seed)
        if len(seeds) != self.num_envs:
            raise ValueError(f"give one seed, or one for each of the {self.num_envs} tokens, not {len(seeds)}")
        super().reset(seed=seeds[0])
        if self.whole_windows:
            self._generators = [np.random.default_rng(seeds[0])]
            self._order = WindowOrder(len(self.windows), self.batch, self._generators[0])
            return
        self._generators = [gymnasium.utils.seeding.np_random(each)[0] for each in seeds]

    def _draw(self, options: dict[str, Any] | None = None) -> None:
        """Begin with other tokens, or with the one that is asked for; `_place` has each token's window and position."""
        self._routes = []
        if self.whole_windows:
            self._draw_windows(options)
            return
        drawn = [draw_place(self.windows, generator) for generator in self._generators[: self.batch]]
        places = [chosen_place(place, options) for place in drawn]
        self.dynamics.reset(*places_to_tensors(self.windows, places))
        self._place = {key: np.tile([place[key] for place in places], self.group_size) for key in places[0]}

    def _draw_windows(self, options: dict[str, Any] | None) -> None:
        if options and "position" in options:
            raise ValueError("whole windows are routed at all positions: give a window alone")
        index, length = next(self._order), self.windows.shape[1] - 1
        index = np.array([chosen_place({"window": int(window), "position": 0}, options)["window"] for window in index])
        tokens, _ = places_to_tensors(self.windows, [{"window": window, "position": 0} for window in index])
        self.dynamics.reset(tokens)
        window, position = np.repeat(index, length), np.tile(np.arange(length), len(index))
        self._place = {"window": np.tile(window, self.group_size), "position": np.tile(position, self.group_size)}
