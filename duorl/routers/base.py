"""Router: it decides which network a token uses. It can be saved and loaded.

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
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType, ref

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from duorl import hub
from duorl.costs import linear_flops
from duorl.extensions import find, import_path
from duorl.files import writing_folder
from duorl.inputs import View
from duorl.routers.card import card
from duorl.routers.fit import require_fit

if TYPE_CHECKING:
    from duorl.models import DuoForCausalLM


class Router(nn.Module):
    """Maps the input of a layer's FFN to actions. Evaluation, generation and reports use only this interface.

    Your own class defines `forward`, or `decide` if it needs more than hidden state, layer and compute. It passes its
    constructor's arguments to this constructor, as keywords. It stores nothing about a pass on itself, because one
    router may serve several passes at the same time; the view has the actions so far. `duorl.testing.check_router`
    checks it.

    Args:
        config: the constructor's arguments, JSON values; a saved router is made again from them.

    Attributes:
        trained_for: identifies the model of its training, see `duorl.routers.fit`; None if it is unknown.
        facts: JSON values for its card: how it was trained, what was measured (`duorl.routers.card`); None without.
    """

    trained_for: dict[str, Any] | None = None
    facts: dict[str, Any] | None = None
    _fits: ReferenceType[nn.Module] | None = None

    def __init__(self, **config: Any):
        super().__init__()
        self.config = config

    def __getstate__(self) -> dict[str, Any]:
        """For copies and other processes, which have other models."""
        return {**self.__dict__, "_fits": None}

    @property
    def takes_price(self) -> bool:
        """Whether it was trained for a range of prices and no price is chosen yet; see `at`."""
        return self.config.get("prices") is not None and self.config.get("price") is None

    def at(self, *, price: float) -> Router:
        """This router at one price, in nats per all-big pass; it must be trained for a range of prices.

        Raises:
            ValueError: it was trained for one price only, or the price is outside of its range.
        """
        if self.config.get("prices") is None:
            raise ValueError("this router was trained for one price: train with env.prices for a range of them")
        low, high = self.config["prices"]
        if not low <= price <= high:
            raise ValueError(f"price {price:g} is outside of {low:g} to {high:g}, for which this router was trained")
        router = copy.copy(self)
        router.config = {**self.config, "price": float(price)}
        return router

    def calibrated(self, model: DuoForCausalLM, windows: Tensor, *, compute: float) -> Router:
        """A router that spends a given compute on some text; no labels are needed.

        For a router for a range of prices, the price is found by bisection. Where no price meets the compute, and for
        routers without a price, a constant times the cost of an action is subtracted from its logit.

        Args:
            model: a duo model.
            windows: (W, T+1), text of the kind that the router will meet.
            compute: target of the mean compute, in (0, 1).

        Raises:
            ValueError: the router has neither a range of prices nor logits, or cannot spend so much, within 0.02. Two
                budgets around the target can be mixed, see `duorl.routers.MixedRouter`.
        """
        from duorl.routers.calibration import calibrated

        return calibrated(self, model, windows, compute)

    def sizes(self) -> tuple[int | None, int | None]:
        """Number of layers and hidden size of the models that it can decide for; None for any."""
        return None, None

    def flops(self) -> float:
        """FLOPs of its own decisions per token, which total FLOPs contain: here, each of its matrices is used once."""
        return float(linear_flops(self))

    def require_fit(self, model: DuoForCausalLM) -> None:
        """Refuse a model that the router cannot decide for.

        Raises:
            ValueError: it is made for other sizes, or was trained for another model; says for which.
        """
        if self._fits is None or self._fits() is not model.backbone:
            require_fit(self, model)
            self._fits = ref(model.backbone)  # a model is looked at once, and not for every token that it generates

    def check(self) -> None:
        """Called after loading; routers with buffers check their values here.

        Raises:
            ValueError: a buffer has impossible values.
        """

    def begin(self, model: DuoForCausalLM, tokens: Tensor) -> None:
        """Called before each pass over windows (B, T+1). Deployable routers do not look at the targets."""

    def decide(self, view: View) -> Tensor:
        """Decide one layer of a pass: (...) int64, 0 skip, 1 small, 2 big.

        Args:
            view: view of the pass; its hidden state has shape (..., d).
        """
        return self(view.hidden, view.layer, view.compute)

    def forward(self, hidden: Tensor, layer: int, compute: Tensor) -> Tensor:
        """Decide one layer from hidden state, layer and compute.

        Args:
            hidden: (..., d), input of the layer's FFN.
            layer: index of the layer.
            compute: (...), compute so far, in [0, 1].

        Returns:
            Shape (...), int64: 0 skip, 1 small, 2 big.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward(self, hidden, layer, compute)")

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `router.safetensors`, if there are weights, and `router.json`, which marks a complete router.

        With facts, also write a card, `README.md`. After an error, the folder is as it was. After a kill, it has
        the old router, the new one, or none, but never parts of both.

        Raises:
            ValueError: a weight is not finite.
        """
        for name, tensor in self.state_dict().items():
            if not tensor.isfinite().all():
                raise ValueError(f"{type(self).__name__} is not saved: its {name} holds numbers that are not finite")
        known = {"model": self.trained_for, "facts": self.facts}
        whole = {**described(self), **{key: value for key, value in known.items() if value is not None}}
        with writing_folder(folder, last="router.json", stale=("router.safetensors",)) as beside:
            if state := {name: tensor.contiguous() for name, tensor in self.state_dict().items()}:
                save_file(state, beside / "router.safetensors")
            if self.facts is not None:
                (beside / "README.md").write_text(card(whole, self.facts), encoding="utf8")
            (beside / "router.json").write_text(json.dumps(whole, indent=1), encoding="utf8")

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload router",
        **more: Any,
    ) -> str:
        """Send the router to the Hugging Face hub, with its card; `duorl.routers.load("owner/name")` loads it there.

        Args:
            repo_id: `owner/name`; the repository is made if there is none.
            private: whether a new repository is private.
            token: of the hub; by default that of `hf auth login`.
            commit_message: message of the commit.
            more: further arguments of `huggingface_hub.HfApi.upload_folder`, for example `revision`.

        Returns:
            The address of the commit.

        Raises:
            OSError: the hub cannot be reached, or refuses it.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return hub.push(folder, repo_id, private=private, token=token, commit_message=commit_message, **more)


class LogitRouter(Router):
    """A router with a number (logit) for every action. In deployment it takes the action with the highest one.

    Attributes:
        codes: (A,) int64, codes of the actions that it chooses from, ascending.
    """

    codes: Tensor

    def sizes(self) -> tuple[int | None, int | None]:
        """Those in its configuration."""
        return self.config.get("layers"), self.config.get("hidden_size")

    def logits(self, view: View) -> Tensor:
        """One logit per action, in the order of their codes: (..., A)."""
        raise NotImplementedError(f"{type(self).__name__} must define logits(self, view)")

    def decide(self, view: View) -> Tensor:
        """(...), the action with the highest logit; see `Router.decide`."""
        return self.codes[self.logits(view).argmax(-1)]

    def forward(self, hidden: Tensor, layer: int, compute: Tensor) -> Tensor:
        """(...), `decide` with a view that has only these three values; see `Router.forward`."""
        return self.decide(View(hidden, layer, compute))

    def priced(self, view: View) -> View:
        """The view with the price of `at`, if it has no price."""
        price = self.config.get("price")
        if view.price is not None or price is None:
            return view
        return replace(view, price=torch.tensor(price, device=view.hidden.device))


def described(router: Router) -> dict[str, Any]:
    """JSON values to make a router again, without weights. Built-in classes by name, others by import path."""
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
    """The router of a description, with new weights.

    Raises:
        ValueError: its class cannot be found, is no router, or refuses its configuration.
    """
    kind, config = kind_of(description)
    try:
        return kind(**config)
    except Exception as error:  # a user's class may raise anything, and what a broken file says may be of any kind
        said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{kind.__name__} refuses its configuration: {said}") from error
