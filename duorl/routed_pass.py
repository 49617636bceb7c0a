"""RoutedPass: a forward pass in which the network of each token is chosen layer by layer.

    walk = RoutedPass(model, tokens)                              # tokens (B, T+1)
    walk.steer(router.decide)                                     # routes (B, T, L)
    walk.losses()                                                 # (B, T), nats

Environment, oracle, evaluation and training use it. The *context* says which keys and values a token reads from the
tokens before it. `routed`: those of their own routed passes, as in deployment. `reference`: those of an all-big pass,
so that tokens do not depend on each other's routes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from duorl.closeness import Closeness
from duorl.costs import SKIP, Tally
from duorl.inputs import View
from duorl.models.families import Context
from duorl.models.ffn import DuoFFN, group_sizes
from duorl.models.footprint import head_rows
from duorl.models.frozen import require_evaluation
from duorl.models.memory import Memory, remembering
from duorl.scores import each

if TYPE_CHECKING:
    from duorl.models.modeling import DuoForCausalLM


@torch.no_grad()
def remember(model: DuoForCausalLM, tokens: Tensor, positions: Tensor | None = None) -> Memory:
    """Run an all-big pass and keep its keys and values for passes in the reference context.

    Args:
        model: a duo model.
        tokens: (B, T+1).
        positions: (B, P), the positions that will be routed; by default all T.

    Returns:
        A memory for `RoutedPass(model, tokens, context="reference", memory=...)`, which can be used several times.

    Raises:
        ValueError: the model's attention does not go through transformers' attention interface, or it cannot read
            the tokens; see `RoutedPass`.
    """
    require_evaluation(model, tokens.shape[1] - 1)
    inputs = tokens[:, :-1]
    if positions is None:
        positions = torch.arange(inputs.shape[1], device=tokens.device).expand_as(inputs)
    memory = Memory(positions, mode="record")
    with remembering(memory):
        model.stack.all_big(inputs)
    if len(memory.stored) != model.num_layers:
        family = model.config.backbone.model_type
        raise ValueError(f"{family}: attention bypasses transformers' attention interface; use context='routed'")
    return replace(memory, mode="read")


class RoutedPass:
    """A forward pass in progress. It stops in front of each layer's feed-forward network (FFN).

    Args:
        model: a duo model.
        tokens: (B, T+1) int64; the last is only a target.
        context: `routed` or `reference`, see the module's docstring.
        copies: number of branches of every window, K; each branch has its own routes. Branches come first in the batch
            axis: tensors have K * B rows, `x.view(K, B, ...)`.
        memory: keys and values that the tokens at its positions read, in place of each other's. Only these tokens are
            routed. In the reference context, by default made by `remember`.
        tally: counts the FLOPs; None: they are not counted.
        price: broadcastable to (K * B, P), nats per all-big pass, for routers that use it.

    Attributes:
        hidden: (K * B, P, d), input of this layer's FFN. P = T, or the number of positions in the memory.
        residual: (K * B, P, d), the residual stream after attention, to which the FFN's output is added; at the end,
            the input of the final norm.
        layer: index of the layer to decide; L at the end.
        compute: (K * B, P), compute so far, in [0, 1].
        layer_input: (K * B, P, d), the residual stream that entered this layer, before its attention.
        targets: (B, P), the tokens to predict.

    Raises:
        ValueError: the model is in training mode, or has fewer than T positions.
    """

    def __init__(
        self,
        model: DuoForCausalLM,
        tokens: Tensor,
        *,
        context: Context = "routed",
        copies: int = 1,
        memory: Memory | None = None,
        tally: Tally | None = None,
        price: Tensor | None = None,
    ):
        require_evaluation(model, tokens.shape[1] - 1)
        if context == "reference" and memory is None:
            memory = remember(model, tokens)
        self.memory, self.tally = memory, tally
        self.stack = model.stack
        self.flops = model.flops
        self.action_compute = self.flops.compute.to(tokens.device, non_blocking=True)
        self._drops_blocks = model.config.skip == "block"
        self.depth = len(self.stack.layers)
        self._positions = None if self.memory is None else self.memory.positions
        self.inputs, self.targets = tokens[:, :-1], tokens[:, 1:]
        if self._positions is not None:
            self.inputs, self.targets = (x.gather(1, self._positions) for x in (self.inputs, self.targets))
        self.layer, self.price = 0, price
        self._previous: Tensor | None = None
        self._taken: tuple[Tensor, ...] = ()
        self.residual: Tensor
        self.hidden: Tensor
        self.layer_input: Tensor
        entering = self._embed(copies)
        self.compute = self.action_compute.new_zeros(entering.shape[:2])  # float32, whatever the model's precision
        self._attend(entering)

    @property
    def done(self) -> bool:
        """Whether all layers are decided."""
        return self.layer == self.depth

    @property
    def view(self) -> View:
        """The view of a router on the pass, (K * B, P, ...)."""
        return View(self.hidden, self.layer, self.compute, self._previous, self._taken, self.price)

    @property
    def copies(self) -> int:
        """Number of branches of every window, K."""
        return len(self.residual) // len(self.inputs)

    def step(self, actions: Tensor, sizes: list[int] | None = None) -> None:
        """Apply the action of each token, (K * B, P) int64; only the chosen networks run. For `sizes` see `DuoFFN`."""
        output = self.stack.ffns[self.layer](self.hidden, actions=actions, sizes=sizes)
        if self.tally:
            self.tally.flops += self.flops.ffns[self.layer, actions.cpu()].sum().item()
        skipped = actions == SKIP if self._drops_blocks else False
        self._advance(self._joined(output, skipped), self.action_compute[self.layer][actions], actions)

    def follow(self, routes: Tensor) -> RoutedPass:
        """Complete the pass along a route per token, (K * B, P, L) action codes of all layers; returns the pass.

        All groups are counted at once, so the host waits for a device once and not in every layer.
        """
        sizes = group_sizes(routes.flatten(0, -2).T).tolist()
        while not self.done:
            self.step(routes[..., self.layer], sizes[self.layer])
        return self

    def steer(self, decide: Callable[[View], Tensor]) -> Tensor:
        """Complete the pass with a router's `decide`; returns the routes, (K * B, P, remaining layers) action codes."""
        before = self.layer
        while not self.done:
            self.step(decide(self.view))
        return torch.stack(self._taken[before:], dim=-1)

    def take(self, action: int) -> None:
        """Apply the same action to all tokens, in this layer."""
        taken = torch.full(self.compute.shape, action, device=self.compute.device)
        self._advance(self._after(action), self.action_compute[self.layer, action], taken)

    def take_all(self, action: int) -> RoutedPass:
        """Complete the pass with the same action for all tokens; returns the pass."""
        while not self.done:
            self.take(action)
        return self

    def mix(self, weights: Tensor, actions: Sequence[int], *, hard: bool = False) -> None:
        """Apply a mixture of actions to each token, differentiable; the soft router of Duo-LLM is trained with it.

        Args:
            weights: (K * B, P, A), share of each action; in the view, the taken action is that with the largest share.
            actions: the A action codes.
            hard: the shares are zeros and a one. Derivatives by the shares are the same. Gradients through the
                networks that a token did not choose are 0 and are not computed.
        """
        ffn = self.stack.ffns[self.layer]
        taken = torch.tensor(list(actions), device=weights.device)[weights.argmax(-1)]
        outputs = [_output(ffn, self.hidden, action, taken if hard else None) for action in actions]
        output = (torch.stack(outputs, dim=-1) @ weights[..., None].to(self.hidden.dtype)).squeeze(-1)
        skipped = sum(weights[..., i] for i, action in enumerate(actions) if action == SKIP)
        self._advance(self._joined(output, skipped), weights @ self.action_compute[self.layer, list(actions)], taken)

    def branch(self, actions: Sequence[int], keep: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor | None:
        """Split every branch into one branch per action: K becomes K * A, with the new action as the last index.

        Args:
            actions: the A action codes.
            keep: chooses branches before the next layer's attention: a function from the residual stream
                (K * A * B, P, d) and the compute (K * A * B, P) to the kept branches of each token, (K', B, P) indices.
                Tokens keep different branches. This is exact only if tokens read a memory and not each other.

        Returns:
            The result of `keep`.
        """
        size, shape = len(self.inputs), self.residual.shape[1:]
        taken = [self._after(action).view(-1, 1, size, *shape) for action in actions]
        completed = torch.cat(taken, dim=1).flatten(0, 2)
        spent = self.action_compute[self.layer, list(actions)].view(1, -1, 1, 1)
        compute = (self.compute.view(-1, 1, size, shape[0]) + spent).flatten(0, 2)
        kept = keep(completed, compute) if keep else None
        if kept is not None:
            completed, compute = pick(completed, kept), pick(compute, kept)
        self.compute = compute
        if self.layer + 1 < self.depth:
            self._embed(len(compute) // size)
        self._advance(completed)
        return kept

    def fork(self) -> RoutedPass:
        """An independent copy of the pass at this point; both share tensors, which no pass changes in place."""
        return copy.copy(self)

    def logits(self) -> Tensor:
        """Logits of the head on the residual stream, (K * B, P, V); at the end, the model's prediction."""
        return self.stack.logits(self.residual)

    def losses(self, stream: Tensor | None = None) -> Tensor:
        """Next-token loss in nats of the head's prediction, (K * B, P).

        Args:
            stream: (K * B, P, d), any residual stream; by default that of the pass. At the end, this gives the model's
                loss. Its derivatives are known; those of the head's weights are not.
        """
        stream = self.residual if stream is None else stream
        return torch.cat(each(self._loss, self._head_parts(stream))).view(stream.shape[:2])

    @torch.no_grad()
    def losses_and_predictions(self) -> tuple[Tensor, Tensor]:
        """At the end of the pass: its losses, (K * B, P) nats, and the most likely next tokens, (K * B, P) int64."""
        parts = [self._loss_and_prediction(*part) for part in self._head_parts(self.residual)]
        losses, predicted = (torch.cat(column).view(self.compute.shape) for column in zip(*parts, strict=True))
        return losses, predicted

    @torch.no_grad()
    def likely(self, count: int) -> tuple[Tensor, Tensor]:
        """At the end of the pass, the most likely next tokens: probabilities and tokens, (K * B, P, count) each."""
        found = [self._head(normalized).softmax(-1).topk(count) for normalized, _ in self._head_parts(self.residual)]
        shares, tokens = (torch.cat(column) for column in zip(*found, strict=True))
        return shares.view(*self.compute.shape, count), tokens.view(*self.compute.shape, count)

    def compare(self, teacher: RoutedPass, closeness: Closeness) -> Tensor:
        """How close the prediction at the end of the pass is to a teacher's, (K * B, P), few enough tokens at a time.

        Args:
            teacher: another finished pass of the same tokens, with one branch.
            closeness: see `duorl.closeness`.
        """
        copies, rows = self.copies, max(1, self._head_rows // (self.copies + 1))
        own, others = (self._normalized(walk.residual) for walk in (self, teacher))
        parts = zip(own.unflatten(0, (copies, -1)).split(rows, 1), others[None].split(rows, 1), strict=True)

        def score(own: Tensor, teacher: Tensor) -> Tensor:
            return closeness(self._log_probabilities(own), self._log_probabilities(teacher))

        return torch.cat(each(score, parts), dim=1).view(self.compute.shape)

    def _head_parts(self, stream: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """A stream (K * B, P, d), normalised, (N, d), with its targets (N,), few enough tokens at a time."""
        targets = self.targets.repeat(len(stream) // len(self.targets), 1).flatten()
        return zip(self._normalized(stream).split(self._head_rows), targets.split(self._head_rows), strict=True)

    def _loss(self, normalized: Tensor, targets: Tensor) -> Tensor:
        """From a normalised stream (N, d), (N,)."""
        return cross_entropy(self._head(normalized), targets, reduction="none")

    def _loss_and_prediction(self, normalized: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """From a normalised stream (N, d), (N,) each."""
        logits = self._head(normalized)
        return cross_entropy(logits, targets, reduction="none"), logits.argmax(-1)

    def _head(self, normalized: Tensor) -> Tensor:
        """Logits in float32, (N, V)."""
        return self.stack.head(normalized[None])[0].float()

    def _log_probabilities(self, normalized: Tensor) -> Tensor:
        """From a normalised stream (K, N, d), (K, N, V). The head gets rows without gaps, which is far faster."""
        rows = normalized.flatten(0, 1)[None]
        return self.stack.head(rows).float().log_softmax(-1).view(*normalized.shape[:2], -1)

    def _normalized(self, stream: Tensor) -> Tensor:
        """What the head reads, (N, d), of a stream (K * B, P, d)."""
        if self.tally:
            self.tally.flops += self.flops.head * stream[..., 0].numel()
        return self.stack.normalized(stream).flatten(0, 1)

    @property
    def _head_rows(self) -> int:
        return head_rows(self.stack.backbone.config.vocab_size, self.residual.device)

    def _embed(self, copies: int) -> Tensor:
        """Record how the model calls its layers for this number of branches; returns the input of layer 0."""
        positions = None if self._positions is None else self._positions.repeat(copies, 1)
        entering, self._calls = self.stack.embed(self.inputs.repeat(copies, 1), positions)
        return entering

    def _attend(self, hidden: Tensor) -> None:
        self.layer_input = hidden
        if self.tally:
            self.tally.flops += self.flops.attention(self.layer, self._read_positions) * hidden[..., 0].numel()
        with remembering(self.memory):
            self.residual, self.hidden = self.stack.attend(self.layer, hidden, self._calls[self.layer])

    @property
    def _read_positions(self) -> int:
        """Number of positions that each token attends to."""
        return self.inputs.shape[1] if self.memory is None else self.memory.looked_at(self.layer)[0].shape[2]

    def _after(self, action: int) -> Tensor:
        """Output of this layer if all tokens take one action."""
        if self.tally:
            self.tally.flops += self.flops.ffns[self.layer, action].item() * self.compute.numel()
        return self._joined(self.stack.ffns[self.layer](self.hidden, actions=action), action == SKIP)

    def _joined(self, output: Tensor, skipped: Tensor | float) -> Tensor:
        """Output of this layer: the networks' output is added to the residual stream.

        If the whole layer is skipped, this is the input of the layer.
        """
        stream = self.residual
        if self._drops_blocks:
            share = torch.as_tensor(skipped, device=stream.device).to(stream.dtype)
            stream = stream.lerp(self.layer_input, share.expand(stream.shape[:2])[..., None])
        return self.stack.complete(self.layer, stream, output)

    def _advance(self, completed: Tensor, spent: Tensor | float = 0.0, actions: Tensor | None = None) -> None:
        self.compute = self.compute + spent
        self._previous = self.hidden
        self._taken = (*self._taken, actions) if actions is not None else ()  # branches have different actions
        self.layer += 1
        if self.done:
            self.residual = self.hidden = self.layer_input = completed
        else:
            self._attend(completed)


def _output(ffn: DuoFFN, hidden: Tensor, action: int, chosen: Tensor | None) -> Tensor:
    """Output of one network for all tokens, (..., d); differentiable for all, or only for `chosen` tokens."""
    if chosen is None or not hidden.requires_grad or ffn.cheaper_than_waiting(hidden.flatten(0, -2)):
        return ffn(hidden, actions=action)
    tokens, own = hidden.flatten(0, -2), (chosen == action).flatten()
    inside, outside = own.nonzero()[:, 0], (~own).nonzero()[:, 0]
    with torch.no_grad():
        rest = torch.empty_like(tokens).index_copy_(0, outside, ffn(tokens.index_select(0, outside), actions=action))
    return rest.index_copy(0, inside, ffn(tokens.index_select(0, inside), actions=action)).view_as(hidden)


def along(walk: RoutedPass, routes: Tensor, index: Tensor | None = None) -> Iterator[tuple[Tensor, RoutedPass]]:
    """Complete a pass along each of several routes, depth first; every shared prefix is computed once.

    Args:
        walk: a pass at any layer; it does not change.
        routes: (R, remaining layers), action codes, the same for all tokens.
        index: (R,), numbers of the routes; by default their rows.

    Yields:
        The numbers of equal routes, and a pass that has followed them to the end.
    """
    index = torch.arange(len(routes), device=routes.device) if index is None else index
    if walk.done:
        yield index, walk
        return
    for action in routes[:, 0].unique().tolist():
        same = routes[:, 0] == action
        child = walk.fork()
        child.take(action)
        yield from along(child, routes[same, 1:], index[same])


def pick(branches: Tensor, index: Tensor) -> Tensor:
    """Choose branches for each token.

    Args:
        branches: (K * B, P, ...).
        index: (K', B, P), in 0..K-1.

    Returns:
        Shape (K' * B, P, ...).
    """
    rest = branches.shape[2:]
    grouped = branches.unflatten(0, (-1, index.shape[1]))  # (K, B, P, ...)
    index = index.view(*index.shape, *[1] * len(rest)).expand(*index.shape, *rest)
    return grouped.gather(0, index).flatten(0, 1)
