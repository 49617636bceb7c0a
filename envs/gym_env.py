"""The Gymnasium environments: `duorl/Routing-v0`, one token or many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from duorl.corpus import load_windows
from duorl.envs.lockstep import RoutingDynamics
from duorl.envs.order import WindowOrder
from duorl.models import check_windows, load, load_tokenizer
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
    """The same as arrays."""
    return {key: values.cpu().numpy() for key, values in observe_tensors(dynamics).items()}


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
        self.observation_space = observation_space(self.dynamics)
        self.action_space = spaces.Discrete(len(self.dynamics.actions))
        self.render_mode = render_mode
        self._place = {"window": 0, "position": 0}
        self._route: list[str] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """Begin with another token; `options` may name its `window` and `position`."""
        super().reset(seed=seed)
        drawn = draw_place(self.windows, self.np_random)
        self._place = {key: int((options or {}).get(key, drawn[key])) for key in drawn}
        tokens, positions = places_to_tensors(self.windows, [self._place])
        self.dynamics.reset(tokens, positions)
        self._route = []
        return self._observation(), dict(self._place)

    def step(self, action):
        """Decide one layer; returns Gymnasium's (observation, reward, terminated, truncated, info)."""
        reward = self.dynamics.step(torch.tensor([int(action)]))
        self._route.append(self.dynamics.actions[int(action)])
        return self._observation(), float(reward), self.dynamics.done, False, self._info()

    def action_masks(self) -> np.ndarray:
        """(A,) bool: the actions that still allow the budget; the MaskablePPO of sb3-contrib calls this."""
        return self.dynamics.action_masks()[0].cpu().numpy()

    def render(self) -> str | None:
        """The route so far as text, e.g. `window 3 position 17: sBBs____`."""
        if self.render_mode is None:
            return None
        marks = "".join({"skip": ".", "small": "s", "big": "B"}[name] for name in self._route)
        route = marks.ljust(self.dynamics.layers, "_")
        return f"window {self._place['window']} position {self._place['position']}: {route}"

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

    All episodes end together; the step that ends them returns the next episode's first observations, and
    `infos["final_obs"]` the last ones (autoreset mode SAME_STEP). `infos` then also has `loss`, `gain` and
    `compute`, each (N,).

    Args:
        num_envs: N tokens.
        tokens_per_window: 1, or T for whole windows.
        group_size: K copies of each window side by side, as (K, B, T) in the first axis.
        context: `reference`, or `routed` for whole windows.
        model, windows, corpus, window, reward, actions, reference: see `DuoRoutingEnv`.

    Raises:
        ValueError: num_envs has the wrong size, or the context needs whole windows.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012  (Gymnasium's protocol)

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
        render_mode: None = None,
    ):
        self.dynamics, self.windows = _build(
            model,
            windows,
            corpus,
            window,
            reward=reward,
            actions=actions,
            context=context,
            group_size=group_size,
            reference=reference,
        )
        length = self.windows.shape[1] - 1
        if tokens_per_window not in (1, length):
            raise ValueError(f"tokens_per_window must be 1 or the window's {length}, not {tokens_per_window}")
        if context == "routed" and tokens_per_window != length:
            raise ValueError(f"context 'routed' routes whole windows: give tokens_per_window={length}")
        if num_envs % (tokens_per_window * group_size):
            raise ValueError(f"num_envs must be a multiple of {tokens_per_window * group_size}, not {num_envs}")
        self.num_envs = num_envs
        self.whole_windows = tokens_per_window == length
        self.batch = num_envs // (tokens_per_window * group_size)
        self.single_observation_space = observation_space(self.dynamics)
        self.single_action_space = spaces.Discrete(len(self.dynamics.actions))
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._generators: list[np.random.Generator] = []

    def reset(self, *, seed: int | Sequence[int] | None = None, options: dict[str, Any] | None = None):
        """Begin N episodes; token i has the seed `seed + i`, or seed i if N seeds are given."""
        if seed is not None or not self._generators:
            self._seed(seed)
        self._draw()
        return observe(self.dynamics), {}

    def step(self, actions):
        """Decide one layer for all N tokens; actions (N,)."""
        choice = torch.as_tensor(np.asarray(actions), dtype=torch.int64)
        rewards = self.dynamics.step(choice).cpu().numpy().astype(np.float64)
        ended = np.full(self.num_envs, self.dynamics.done)
        infos: dict[str, Any] = {}
        if self.dynamics.done:
            outcome, final = self.dynamics.outcome, observe(self.dynamics)
            infos = {name: getattr(outcome, name).cpu().numpy() for name in ("loss", "gain", "compute")}
            rows = [{key: values[i] for key, values in final.items()} for i in range(self.num_envs)]
            infos["final_obs"] = np.array([*rows, None], dtype=object)[:-1]
            self._draw()
        return observe(self.dynamics), rewards, ended, np.zeros_like(ended), infos

    def _seed(self, seed: int | Sequence[int] | None) -> None:
        if self.whole_windows:
            first = seed if seed is None or isinstance(seed, int) else seed[0]
            self._order = WindowOrder(len(self.windows), self.batch, np.random.default_rng(first))
            self._generators = [np.random.default_rng(first)]
            return
        if seed is None or isinstance(seed, int):
            seed = [seed + i for i in range(self.num_envs)] if seed is not None else [None] * self.num_envs  # type: ignore[list-item]
        self._generators = [gymnasium.utils.seeding.np_random(each)[0] for each in seed]

    def _draw(self) -> None:
        if self.whole_windows:
            self.dynamics.reset(self.windows[torch.from_numpy(next(self._order))])
            return
        places = [draw_place(self.windows, generator) for generator in self._generators[: self.batch]]
        self.dynamics.reset(*places_to_tensors(self.windows, places))


def draw_place(windows: Tensor, generator: np.random.Generator) -> dict[str, int]:
    """Draw a token uniformly: its window, and its position in the window."""
    count, length = windows.shape
    return {"window": int(generator.integers(count)), "position": int(generator.integers(length - 1))}


def places_to_tensors(windows: Tensor, places: Sequence[dict[str, int]]) -> tuple[Tensor, Tensor]:
    """The windows (B, T+1) and positions (B, 1) of some tokens.

    Raises:
        ValueError: a window or position is out of range.
    """
    count, length = windows.shape
    for place in places:
        if not (0 <= place["window"] < count and 0 <= place["position"] < length - 1):
            raise ValueError(f"{place} is out of range: there are {count} windows of {length - 1} tokens")
    tokens = windows[[place["window"] for place in places]]
    return tokens, torch.tensor([[place["position"]] for place in places])
