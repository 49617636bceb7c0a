"""Router: what decides, and how it is saved.

class Mine(duorl.routers.Router):                                   # in mine.py
    def forward(self, hidden, layer, compute):                      # (..., d), int, (...) -> (...) action codes
        return torch.full(hidden.shape[:-1], 2 if layer < 3 else 1, device=hidden.device)

Mine().save_pretrained("my-router")                                 # duorl evaluate --router my-router
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType, ref

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from duorl.extensions import find, import_path
from duorl.files import writing
from duorl.inputs import View
from duorl.routers.fit import require_fit

if TYPE_CHECKING:
    from duorl.models import DuoForCausalLM


class Router(nn.Module):
    """Maps what a layer's FFN would read to actions. All that evaluation, generation and reports know.

    A class of your own defines `forward`, or `decide` where it looks at more than hidden state, layer and compute. It
    hands its constructor's arguments to this one, as keywords. It keeps nothing of a pass on itself, so that one router
    serves many passes at once: what a pass has done so far is in its view. `duorl.testing.check_router` tries it.

    Args:
        config: the constructor's arguments, JSON values; a saved router is rebuilt from them.

    Attributes:
        trained_for: what identifies the model that it was trained for, see `duorl.routers.fit`; None for none.
    """

    trained_for: dict[str, Any] | None = None
    _fits: ReferenceType[DuoForCausalLM] | None = None

    def __init__(self, **config: Any):
        super().__init__()
        self.config = config

    @property
    def takes_price(self) -> bool:
        """It was trained for a range of prices and has not been told one: see `at`."""
        return self.config.get("prices") is not None and self.config.get("price") is None

    def at(self, *, price: float) -> Router:
        """This router at a price, in nats per all-big pass, where it was trained for a range of them.

        Raises:
            ValueError: it was trained for one price alone, or not for this one.
        """
        if self.config.get("prices") is None:
            raise ValueError("this router was trained for one price: train with env.prices for a range of them")
        low, high = self.config["prices"]
        if not low <= price <= high:
            raise ValueError(f"price {price:g} is outside of {low:g} to {high:g}, for which this router was trained")
        router = copy.copy(self)
        router.config = {**self.config, "price": float(price)}
        return router

    def sizes(self) -> tuple[int | None, int | None]:
        """Number of layers and hidden size of the models that it can decide for; None for any."""
        return None, None

    def require_fit(self, model: DuoForCausalLM) -> None:
        """Refuse a model that the router cannot decide for.

        Raises:
            ValueError: it is made for other sizes, or was trained for another model; says for which.
        """
        if self._fits is None or self._fits() is not model:
            require_fit(self, model)
            self._fits = ref(model)  # a model is looked at once, and not for every token that it generates

    def check(self) -> None:
        """Called when it has been loaded.

        Raises:
            ValueError: its buffers hold what they cannot hold.
        """

    def begin(self, model: DuoForCausalLM, tokens: Tensor) -> None:
        """Called before each pass over windows (B, T+1). Deployable routers do not look at the targets."""

    def decide(self, view: View) -> Tensor:
        """Decide one layer of a pass: (...) int64, 0 skip, 1 small, 2 big.

        Args:
            view: the pass; its hidden state has shape (..., d).
        """
        return self(view.hidden, view.layer, view.compute)

    def forward(self, hidden: Tensor, layer: int, compute: Tensor) -> Tensor:
        """Decide one layer from what every pass knows.

        Args:
            hidden: (..., d), what the layer's FFN would read.
            layer: its index.
            compute: (...), spent so far, in [0, 1].

        Returns:
            Shape (...), int64: 0 skip, 1 small, 2 big.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward(self, hidden, layer, compute)")

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `router.json`, whose presence means a whole router, and, where there are weights, `router.safetensors`.

        A kill leaves the router that the folder held before, the new one, or none: never parts of both.

        Raises:
            ValueError: a weight is not finite.
        """
        for name, tensor in self.state_dict().items():
            if not tensor.isfinite().all():
                raise ValueError(f"{type(self).__name__} is not saved: its {name} holds numbers that are not finite")
        weights, described_in = Path(folder) / "router.safetensors", Path(folder) / "router.json"
        with writing(described_in) as beside:
            known = {} if self.trained_for is None else {"model": self.trained_for}
            beside.write_text(json.dumps({**described(self), **known}, indent=1))
            if state := {name: tensor.contiguous() for name, tensor in self.state_dict().items()}:
                with writing(weights) as weights_beside:
                    save_file(state, weights_beside)
                    described_in.unlink(missing_ok=True)
            else:
                described_in.unlink(missing_ok=True)
                weights.unlink(missing_ok=True)


class LogitRouter(Router):
    """A router with a number for every action; deployed, it takes the one with the highest.

    Attributes:
        codes: (A,) int64, the actions that it chooses from, ascending.
    """

    codes: Tensor

    def sizes(self) -> tuple[int | None, int | None]:
        """Those in its configuration."""
        return self.config.get("layers"), self.config.get("hidden_size")

    def logits(self, view: View) -> Tensor:
        """One number per action, in the order of their codes: (..., A)."""
        raise NotImplementedError(f"{type(self).__name__} must define logits(self, view)")

    def decide(self, view: View) -> Tensor:
        """(...), the action with the highest logit; see `Router.decide`."""
        return self.codes[self.logits(view).argmax(-1)]

    def forward(self, hidden: Tensor, layer: int, compute: Tensor) -> Tensor:
        """(...), the same where there is nothing more to see; see `Router.forward`."""
        return self.decide(View(hidden, layer, compute))

    def priced(self, view: View) -> View:
        """The view at the price of `at`, where it has none of its own."""
        price = self.config.get("price")
        if view.price is not None or price is None:
            return view
        return replace(view, price=torch.tensor(price, device=view.hidden.device))


def described(router: Router) -> dict[str, Any]:
    """What a router is rebuilt from, its weights apart: JSON values. Our classes by name, others by import path."""
    kind = type(router)
    name = kind.__name__ if kind.__module__.startswith("duorl.routers.") else import_path(kind)
    return {"router": name, "config": router.config}


def kind_of(description: Any) -> tuple[type[Router], dict[str, Any]]:
    """The class and the configuration in a description.

    Raises:
        ValueError: one is missing, or the class cannot be found, or is no router.
    """
    from duorl import routers

    if not isinstance(description, dict):
        raise ValueError("a router's description is an object with `router` and `config`")
    name, config = description.get("router"), description.get("config")
    if not isinstance(name, str) or not isinstance(config, dict):
        raise ValueError("a router's description has a name `router` and an object `config`")
    kind = find(name) if "." in name else getattr(routers, name, None) if name in routers.__all__ else None
    if not (isinstance(kind, type) and issubclass(kind, Router)):
        raise ValueError(f"unknown router {name!r}")
    return kind, config


def rebuilt(description: Any) -> Router:
    """The router of a description, with fresh weights.

    Raises:
        ValueError: its class cannot be found, is no router, or refuses its configuration.
    """
    kind, config = kind_of(description)
    try:
        return kind(**config)
    except Exception as error:  # a user's class may raise anything, and what a broken file says may be of any kind
        said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{kind.__name__} refuses its configuration: {said}") from error
