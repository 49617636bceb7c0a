"""Calls: the state of one forward pass, kept outside of the modules.

A context variable has the current call of a thread. The model's layers, its decoder (the part between embedding and
head) and its feed-forward networks ask this call what to do. Without a call, they work as usual. So one model can be
used by many threads at the same time, and changes of its modules by others, for example hooks of accelerate, remain.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from duorl.costs import SKIP
from duorl.inputs import View
from duorl.models.scoped import Scoped, uncompiled

if TYPE_CHECKING:
    from duorl.models.ffn import DuoFFN

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of a layer, without the hidden state: positional and keyword arguments."""

Skip = Literal["ffn", "block"]
"""What the action `skip` leaves out: the feed-forward network, or also the attention's output."""


def known_skip(skip: str) -> str:
    """Check `skip` and return it.

    Raises:
        ValueError: it is not one of `Skip`.
    """
    if skip not in get_args(Skip):
        raise ValueError(f"skip drops {' or '.join(get_args(Skip))}, not {skip!r}")
    return skip


class Call:
    """Base class of calls; it changes nothing."""

    def ffn(self, ffn: DuoFFN, hidden: Tensor) -> Tensor:
        """Run the networks of a layer on (..., d): here the big one."""
        return ffn.big(hidden)

    def layer(self, forward: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run a layer; `forward` is the original method of its class."""
        return forward(hidden, *args, **kwargs)

    def decoder(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the decoder; `forward` is the original method of its class."""
        return forward(*args, **kwargs)


_call: Scoped[Call] = Scoped("call")
current, calling = _call.get, _call.having
"""The call of this thread, or None; and a block in which parts of models ask a call. None: they work as usual."""


class RecordedLayers(Call):
    """Layers only record their arguments and return their input.

    Args:
        in_tuple: they return it in a tuple.

    Attributes:
        entering: (B, P, d), input of the first layer.
        arguments: arguments of each layer.
    """

    def __init__(self, *, in_tuple: bool):
        self.in_tuple = in_tuple
        self.entering: Tensor | None = None
        self.arguments: list[Arguments] = []

    def layer(self, forward: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the hidden state unchanged."""
        if self.entering is None:
            self.entering = hidden
        self.arguments.append((args, kwargs))
        return (hidden,) if self.in_tuple else hidden


class GivenStream(Call):
    """Layers return a given residual stream, for any input.

    Args:
        stream: (B, P, d).
        in_tuple: they return it in a tuple.
    """

    def __init__(self, stream: Tensor, *, in_tuple: bool):
        self.output = (stream,) if in_tuple else stream

    def layer(self, forward: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The given one."""
        return self.output


class GivenDecoderOutput(Call):
    """The decoder returns a given output, so that only the model's head runs."""

    def __init__(self, output: Any):
        self.output = output

    def decoder(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The given one."""
        return self.output


class BypassedFFN(Call):
    """Networks do not run: their input is recorded, and nothing is added to the residual stream.

    Attributes:
        captured: (..., d), input of the network.
    """

    captured: Tensor

    def ffn(self, ffn: DuoFFN, hidden: Tensor) -> Tensor:
        """Return zeros, as a new tensor, because Falcon changes it in place."""
        self.captured = hidden
        return torch.zeros_like(hidden)


class RoutedCall(Call):
    """One forward pass of the whole model in which the network of each token is chosen in every layer.

    Args:
        decide: a function from a view of the pass to actions.
        action_compute: (L, 3), compute of each action in each layer.
        drops_blocks: skip also leaves out the attention's output.
    """

    def __init__(self, decide: Callable[[View], Tensor], action_compute: Tensor, *, drops_blocks: bool):
        self.decide = decide
        self.action_compute = action_compute
        self.drops_blocks = drops_blocks
        self.compute: Tensor | None = None
        self.previous: Tensor | None = None
        self.taken: tuple[Tensor, ...] = ()
        self._shape: torch.Size  # of the stream: OPT's layers flatten it

    def ffn(self, ffn: DuoFFN, hidden: Tensor) -> Tensor:
        """Run the chosen network of each token."""
        layer, given = len(self.taken), hidden.shape
        hidden = hidden.view(self._shape)
        before = self.action_compute.new_zeros(hidden.shape[:-1]) if self.compute is None else self.compute
        view, token = View(hidden, layer, before, self.previous, self.taken), _call.variable.set(None)
        try:  # a router may run models; a context manager here would take longer than its decision
            actions = self.decide(view)
        finally:
            _call.variable.reset(token)
        if actions.shape != before.shape:
            raise ValueError(f"a router gave {tuple(actions.shape)} actions for {tuple(before.shape)} tokens")
        self.compute = before + self.action_compute[layer].take(actions)
        self.previous, self.taken = hidden, (*self.taken, actions)
        return ffn.route(hidden, actions).view(given)

    def layer(self, forward: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run a layer; if the whole layer is skipped, the token keeps its input."""
        self._shape = hidden.shape
        output = forward(hidden, *args, **kwargs)
        if not self.drops_blocks:
            return output
        skipped = (self.taken[-1] == SKIP)[..., None]
        if isinstance(output, tuple):
            return torch.where(skipped, hidden, output[0]), *output[1:]
        return torch.where(skipped, hidden, output)


Part = Literal["layer", "decoder"]


def let_ask(module: nn.Module, part: Part) -> None:
    """Make a layer or a decoder ask the current call: its class becomes a subclass with the same name."""
    kind: Any = type(module)
    module.__class__ = _asking(kind, part)


@cache
def _asking(base: Any, part: Part) -> Any:
    own: Callable[..., Any] = base.forward

    @wraps(own)  # transformers reads the signature of forward
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if _call.anywhere:
            return _ask(part, own.__get__(self), *args, **kwargs)
        return own(self, *args, **kwargs)

    def reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
        """For pickle and deepcopy, which cannot find the class by its name: make it again from its base."""
        return _new, (base, part), *object.__reduce_ex__(self, max(2, protocol))[2:]

    names = {"forward": forward, "__reduce_ex__": reduce, "__module__": base.__module__, "__doc__": base.__doc__}
    return type(base)(base.__name__, (base,), {**names, "__qualname__": base.__qualname__})


@uncompiled
def _ask(part: Part, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    call = current()
    return forward(*args, **kwargs) if call is None else getattr(call, part)(forward, *args, **kwargs)


def _new(base: Any, part: Part) -> nn.Module:
    return nn.Module.__new__(_asking(base, part))
