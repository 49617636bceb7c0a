"""RoutedPass: a forward pass that one steers layer by layer.

    walk = RoutedPass(model, tokens)                              # tokens (B, T+1)
    while not walk.done:
        walk.step(router(walk.hidden, walk.layer, walk.compute))  # actions (B, T)
    walk.losses()                                                 # (B, T), nats

Environment, oracle, evaluation and training are skins over it. The *context* says which keys and values a
token reads from the tokens before it: in `routed`, those of their own routed passes, as in deployment; in
`reference`, those of an all-big pass, so that tokens do not depend on each other's routes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from duorl.models.attention import Memory, remembering
from duorl.models.modeling import DuoForCausalLM

Context = Literal["routed", "reference"]
_LOGITS_AT_ONCE = 2**25  # elements; bounds the memory of the head


@torch.no_grad()
def remember(model: DuoForCausalLM, tokens: Tensor, positions: Tensor | None = None) -> Memory:
    """Run an all-big pass and keep its keys and values for passes in the reference context.

    Args:
        model: a duo model.
        tokens: (B, T+1).
        positions: (B, P), the positions that will be routed; all T unless given.

    Returns:
        A memory for `RoutedPass(model, tokens, context="reference", memory=...)`, usable any number of times.

    Raises:
        ValueError: the model's attention does not go through transformers' attention interface.
    """
    inputs = tokens[:, :-1]
    if positions is None:
        positions = torch.arange(inputs.shape[1], device=tokens.device).expand_as(inputs)
    memory = Memory(positions)
    with remembering(memory):
        model.stack.all_big(inputs)
    if len(memory.stored) != model.num_layers:
        family = model.config.backbone.model_type
        raise ValueError(f"{family}: attention bypasses transformers' attention interface; use context='routed'")
    memory.recording = False
    return memory


class RoutedPass:
    """A forward pass in progress, stopped where a layer's feed-forward network is chosen.

    Args:
        model: a duo model.
        tokens: (B, T+1) int64; the last is only a target.
        context: `routed` or `reference`, see the module's docstring.
        copies: K branches of every window, each routed on its own; they come first in the batch axis, so
            tensors have K * B rows, `x.view(K, B, ...)` side by side.
        memory: what `remember` kept of the same tokens, to share between passes in the reference context;
            made here unless given. Its positions are the ones routed.

    Attributes:
        hidden: (K * B, P, d), what this layer's FFN would read. P = T unless the memory names fewer positions.
        residual: (K * B, P, d), the residual stream after attention, which the FFN's output will join; at the
            end, what enters the final norm.
        layer: index of the layer to decide; L at the end.
        compute: (K * B, P), compute spent so far, in [0, 1].
        entered: (K * B, P, d), the residual stream that entered this layer, before its attention.
        targets: (B, P), the tokens to predict.
    """

    def __init__(
        self,
        model: DuoForCausalLM,
        tokens: Tensor,
        *,
        context: Context = "routed",
        copies: int = 1,
        memory: Memory | None = None,
    ):
        if context == "reference" and memory is None:
            memory = remember(model, tokens)
        self.memory = memory if context == "reference" else None
        self.stack = model.stack
        self.action_compute = model.action_compute
        self.depth = model.num_layers
        self._positions = None if self.memory is None else self.memory.positions
        pick = (lambda x: x) if self._positions is None else lambda x: x.gather(1, self._positions)
        self.inputs, self.targets = pick(tokens[:, :-1]), pick(tokens[:, 1:])
        self.layer = 0
        self.residual: Tensor
        self.hidden: Tensor
        self.entered: Tensor
        entering = self._embed(copies)
        self.compute = entering.new_zeros(entering.shape[:2])
        self._attend(entering)

    @property
    def done(self) -> bool:
        """All layers are decided."""
        return self.layer == self.depth

    @property
    def copies(self) -> int:
        """Branches of every window, K."""
        return len(self.residual) // len(self.inputs)

    def step(self, actions: Tensor) -> None:
        """Let every token take its own action: (K * B, P) int64; only the chosen networks run."""
        output = self.stack.ffns[self.layer].route(self.hidden, actions)
        self._advance(output, self.action_compute[self.layer][actions])

    def take(self, action: int) -> None:
        """Let all tokens take one action."""
        output = self.stack.ffns[self.layer].run(self.hidden, action)
        self._advance(output, self.action_compute[self.layer, action])

    def mix(self, weights: Tensor, actions: Sequence[int]) -> None:
        """Let every token take a mixture of actions, differentiable: the learned router of Duo-LLM trains through it.

        Args:
            weights: (K * B, P, A), each action's share.
            actions: the A actions' codes.
        """
        ffn = self.stack.ffns[self.layer]
        outputs = torch.stack([ffn.run(self.hidden, action) for action in actions], dim=-1)  # (K * B, P, d, A)
        output = (outputs @ weights[..., None]).squeeze(-1)
        self._advance(output, weights @ self.action_compute[self.layer, list(actions)])

    def branch(self, actions: Sequence[int]) -> None:
        """Split every branch into one per action, the newest varying fastest: K becomes K * A."""
        ffn, size, count = self.stack.ffns[self.layer], len(self.inputs), len(actions)
        shape = self.residual.shape[1:]
        outputs = [ffn.run(self.hidden, action).view(-1, 1, size, *shape) for action in actions]
        output = torch.cat(outputs, dim=1).flatten(0, 2)
        self.residual = _repeat_branches(self.residual, size, count)
        self.compute = _repeat_branches(self.compute, size, count)
        spent = self.action_compute[self.layer, list(actions)]
        self._embed(self.copies)
        self._advance(output, spent.repeat_interleave(size).repeat(len(output) // (size * count))[:, None])

    def fork(self) -> RoutedPass:
        """An independent copy of this point of the pass; tensors are shared, none is ever written in place."""
        return copy.copy(self)

    def logits(self) -> Tensor:
        """The head on the residual stream: (K * B, P, V), at the end the model's prediction."""
        return self.stack.logits(self.residual)

    def losses(self, stream: Tensor | None = None) -> Tensor:
        """Next-token loss in nats of the head's prediction, (K * B, P).

        Args:
            stream: (K * B, P, d), any residual stream; the pass's own unless given, which at the end is the
                model's loss.
        """
        stream = self.residual if stream is None else stream
        vocabulary = self.stack.backbone.config.vocab_size
        rows = max(1, _LOGITS_AT_ONCE // (vocabulary * stream.shape[1]))
        targets = self.targets.repeat(self.copies, 1)
        parts = zip(stream.split(rows), targets.split(rows), strict=True)
        return torch.cat([self._loss(hidden, target) for hidden, target in parts])

    def _loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = self.stack.logits(hidden).float().flatten(0, 1)
        return cross_entropy(logits, targets.flatten(), reduction="none").view_as(targets)

    def _embed(self, copies: int) -> Tensor:
        """Ask the model how it calls its layers for this many branches; returns what enters layer 0."""
        positions = None if self._positions is None else self._positions.repeat(copies, 1)
        entering, self._calls = self.stack.embed(self.inputs.repeat(copies, 1), positions)
        return entering

    def _attend(self, hidden: Tensor) -> None:
        self.entered = hidden
        with remembering(self.memory):
            self.residual, self.hidden = self.stack.attend(self.layer, hidden, self._calls[self.layer])

    def _advance(self, output: Tensor, spent: Tensor) -> None:
        completed = self.stack.complete(self.layer, self.residual, output)
        self.compute = self.compute + spent
        self.layer += 1
        if self.done:
            self.residual = self.hidden = self.entered = completed
        else:
            self._attend(completed)


def _repeat_branches(x: Tensor, size: int, count: int) -> Tensor:
    """(K * B, ...) to (K * A * B, ...), each branch A times in a row."""
    x = x.view(-1, 1, size, *x.shape[1:])
    return x.expand(-1, count, *x.shape[2:]).flatten(0, 2)
