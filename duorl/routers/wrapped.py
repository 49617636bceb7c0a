"""WrappedRouter: the base of routers that change the logits of another router."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from duorl.routers import base
from duorl.routers.base import LogitRouter


class WrappedRouter(LogitRouter):
    """A router over another one; a subclass defines `logits`.

    Args:
        router: a router with logits; or, when it is loaded from a file, its class's name and `config`.
        config: the other arguments of the subclass's constructor.

    Raises:
        ValueError: the router has no logits.
    """

    def __init__(self, router: LogitRouter | dict[str, Any], **config: Any):
        inner = base.rebuilt(router) if isinstance(router, dict) else router
        if not isinstance(inner, LogitRouter):
            raise ValueError(f"{type(self).__name__} needs a LogitRouter, not {type(inner).__name__}")
        super().__init__(router=base.described(inner), **config)
        self.router = inner

    @property
    def trained_for(self) -> dict[str, Any] | None:  # type: ignore[override]
        """What the router's is."""
        return self.router.trained_for

    @trained_for.setter
    def trained_for(self, record: dict[str, Any] | None) -> None:
        self.router.trained_for = record

    def sizes(self) -> tuple[int | None, int | None]:
        """The router's."""
        return self.router.sizes()

    def flops(self) -> float:
        """The router's."""
        return self.router.flops()

    @property
    def takes_price(self) -> bool:
        """See `Router.takes_price`."""
        return self.router.takes_price

    @property
    def codes(self) -> Tensor:  # type: ignore[override]
        """(A,) int64, the codes of the router."""
        return self.router.codes
