"""What one call changes in a duo model: state that lives with the call, not on the modules.

A context variable holds the call that a thread is in. The model's layers, its decoder (the part between embedding and
head) and its feed-forward networks ask it what to do; without a call they do what they always do. So one model serves
many threads at once, and what others hang on its modules, accelerate's hooks for instance, stays there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, wraps
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from duorl.costs import SKIP
from duorl.inputs import View

if TYPE_CHECKING:
    from duorl.models.ffn import DuoFFN

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""How a model calls a layer, the hidden state apart: positional arguments and keywords."""

Skip = Literal["ffn", "block"]
"""What the action `skip` drops of a layer: the feed-forward network, or the attention's output as well."""


def known_skip(skip: str) -> str:
    """`skip` itself.

    Raises:
        ValueError: it is not one of `Skip`.
    """
    if skip not in get_args(Skip):
        raise ValueError(f"skip drops {' or '.join(get_args(Skip))}, not {skip!r}")
    return skip


class Call:
    """A call of the model's parts; this one changes nothing."""

    def ffn(self, ffn: DuoFFN, hidden: Tensor) -> Tensor:
        """A layer's networks on (..., d): big."""
        return ffn.big(hidden)

    def layer(self, forward: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """A layer, of which `forward` is its class's own."""
        return forward(hidden, *args, **kwargs)

    def decoder(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The decoder, of which `forward` is its class's own."""
        return forward(*args, **kwargs)


_current: ContextVar[Call | None] = ContextVar("call", default=None)
current = _current.get


@contextmanager
def calling(call: Call | None) -> Iterator[None]:
    """Let a model's parts ask `call` inside; None: nothing is changed."""
    token = _current.set(call)
    try:
        yield
    finally:
        _current.reset(token)


class RecordedLayers(Call):
    """Layers that only note how they are called, and hand on what enters them.

    Args:
        in_tuple: they do so in a tuple.

    Attributes:
        entering: (B, P, d), what enters the first layer.
        arguments: per layer how it was called.
    """

    def __init__(self, *, in_tuple: bool):
        self.in_tuple = in_tuple
        self.entering: Tensor | None = None
        self.arguments: list[Arguments] = []

    def layer(self, forward: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The hidden state as it came."""
        if self.entering is None:
            self.entering = hidden
        self.arguments.append((args, kwargs))
        return (hidden,) if self.in_tuple else hidden


class GivenStream(Call):
    """Layers that hand on a given residual stream, whatever enters them.

    Args:
        stream: (B, P, d).
        in_tuple: they do so in a tuple.
    """

    def __init__(self, stream: Tensor, *, in_tuple: bool):
        self.output = (stream,) if in_tuple else stream

    def layer(self, forward: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The given one."""
        return self.output


class GivenDecoderOutput(Call):
    """A decoder that answers with a given output, so that only the model's head runs."""

    def __init__(self, output: Any):
        self.output = output

    def decoder(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The given one."""
        return self.output


class BypassedFFN(Call):
    """Networks that do not run: their input is captured, and nothing joins the residual stream.

    Attributes:
        captured: (..., d), what the network would have read.
    """

    captured: Tensor

    def ffn(self, ffn: DuoFFN, hidden: Tensor) -> Tensor:
        """Zeros, a tensor of its own: Falcon adds to it in place."""
        self.captured = hidden
        return torch.zeros_like(hidden)


class RoutedCall(Call):
    """One forward pass of the whole model in which every layer's networks are chosen per token.

    Args:
        decide: from a view of the pass to actions.
        action_compute: (L, 3), compute of each action in each layer.
        drops_blocks: a skipped layer is dropped whole, its attention's output with it.
    """

    def __init__(self, decide: Callable[[View], Tensor], action_compute: Tensor, *, drops_blocks: bool):
        self.decide = decide
        self.action_compute = action_compute
        self.drops_blocks = drops_blocks
        self.compute: Tensor | None = None
        self.previous: Tensor | None = None
        self.taken: tuple[Tensor, ...] = ()

    def ffn(self, ffn: DuoFFN, hidden: Tensor) -> Tensor:
        """Each token's own network."""
        layer = len(self.taken)
        before = self.action_compute.new_zeros(hidden.shape[:-1]) if self.compute is None else self.compute
        with calling(None):  # a router may run models itself
            actions = self.decide(View(hidden, layer, before, self.previous, self.taken))
        self.compute = before + self.action_compute[layer][actions]
        self.previous, self.taken = hidden, (*self.taken, actions)
        return ffn.route(hidden, actions)

    def layer(self, forward: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """A layer; what it added is taken back where the whole of it is skipped."""
        output = forward(hidden, *args, **kwargs)
        if not self.drops_blocks:
            return output
        skipped = (self.taken[-1] == SKIP)[..., None]
        if isinstance(output, tuple):
            return torch.where(skipped, hidden, output[0]), *output[1:]
        return torch.where(skipped, hidden, output)


Part = Literal["layer", "decoder"]


def let_ask(module: nn.Module, part: Part) -> None:
    """Let a layer or a decoder ask the call it is in: it gets a subclass of its own class, of the same name."""
    kind: Any = type(module)
    module.__class__ = _asking(kind, part)


@cache
def _asking(base: Any, part: Part) -> Any:
    own: Callable[..., Any] = base.forward

    @wraps(own)  # transformers reads a forward's parameters
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = current()
        if call is None:
            return own(self, *args, **kwargs)
        return getattr(call, part)(own.__get__(self), *args, **kwargs)

    def reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
        """The class has no name that pickle and deepcopy could find it by: it is made again from its base."""
        return _new, (base, part), *object.__reduce_ex__(self, max(2, protocol))[2:]

    names = {"forward": forward, "__reduce_ex__": reduce, "__module__": base.__module__, "__doc__": base.__doc__}
    return type(base)(base.__name__, (base,), {**names, "__qualname__": base.__qualname__})


def _new(base: Any, part: Part) -> nn.Module:
    return nn.Module.__new__(_asking(base, part))
