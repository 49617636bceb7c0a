"""Router: what decides, and how it is saved."""

from __future__ import annotations

import copy
import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from duorl.models.modeling import DuoForCausalLM

_KINDS: dict[str, type[Router]] = {}


class Router(nn.Module):
    """Maps what a layer's FFN would read to actions. All that evaluation, generation and reports know.

    Args:
        config: the constructor's arguments, JSON values; a saved router is rebuilt from them.
    """

    def __init__(self, **config):
        super().__init__()
        self.config = config

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        _KINDS[cls.__name__] = cls

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

    def begin(self, model: DuoForCausalLM, tokens: Tensor) -> None:
        """Called before each pass over windows (B, T+1). Deployable routers do not look at the targets."""

    def forward(self, hidden: Tensor, layer: int, compute: Tensor) -> Tensor:
        """Decide one layer.

        Args:
            hidden: (..., d), what the layer's FFN would read.
            layer: its index.
            compute: (...), spent so far, in [0, 1].

        Returns:
            Shape (...), int64: 0 skip, 1 small, 2 big.
        """
        raise NotImplementedError

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `router.json` and, where there are weights, `router.safetensors`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if state := {name: tensor.contiguous() for name, tensor in self.state_dict().items()}:
            save_file(state, folder / "router.safetensors")
        content = {"router": type(self).__name__, "config": self.config}
        (folder / "router.json").write_text(json.dumps(content, indent=1))  # last: its presence means a whole router


def load(folder: str | Path) -> Router:
    """A saved router.

    Raises:
        FileNotFoundError: the folder holds no router, or its weights are missing.
        ValueError: it was saved by a class that is not imported.
    """
    folder = Path(folder)
    if not (folder / "router.json").is_file():
        raise FileNotFoundError(f"no router in {folder}: router.json is missing")
    content = json.loads((folder / "router.json").read_text())
    if content["router"] not in _KINDS:
        raise ValueError(f"{folder}: unknown router {content['router']!r}, choose from {', '.join(sorted(_KINDS))}")
    router = _KINDS[content["router"]](**content["config"])
    if router.state_dict():
        if not (folder / "router.safetensors").is_file():
            raise FileNotFoundError(f"{folder} lacks router.safetensors")
        router.load_state_dict(load_file(folder / "router.safetensors"))
    return router.eval()
