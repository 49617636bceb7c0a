"""DecoderStack: walks a Hugging Face decoder layer by layer, whatever its family.

Two techniques make it model-agnostic. *Caught calls*: the model's own forward runs once with layers that
only record how they were called (masks, position embeddings), and are then called one by one with that.
*Muted FFN*: a muted `DuoFFN` returns zeros, so the layer's output is the residual stream after attention,
and adding the chosen network's output completes the layer, for sequential and parallel residuals alike.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from duorl.models.ffn import DuoFFN

Call = tuple[tuple[Any, ...], dict[str, Any]]


def find_layers(backbone: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers: the longest list of modules that each have an `mlp`.

    Raises:
        ValueError: the model has no such list.
    """
    lists = [m for m in backbone.modules() if isinstance(m, nn.ModuleList) and len(m)]
    stacks = [m for m in lists if all(isinstance(getattr(layer, "mlp", None), nn.Module) for layer in m)]
    if not stacks:
        raise ValueError(f"{type(backbone).__name__}: no decoder layers with an `mlp` module, so nothing to route")
    return max(stacks, key=len)


class DecoderStack:
    """The steps of a forward pass over a decoder whose layers' `mlp` are `DuoFFN`s.

    `embed`, then per layer `attend` and `complete`, then `logits`.

    Attributes:
        layers: the decoder's layers.
        ffns: their two networks.
    """

    def __init__(self, backbone: PreTrainedModel):
        self.backbone = backbone
        self.layers = find_layers(backbone)
        self._decoder = cast(nn.Module, backbone.base_model)

        self.ffns = [cast(DuoFFN, layer.mlp) for layer in self.layers]

    def embed(self, input_ids: Tensor, positions: Tensor | None = None) -> tuple[Tensor, list[Call]]:
        """What enters layer 0, (B, P, d), and how the model calls each layer.

        Args:
            input_ids: (B, P).
            positions: (B, P), the tokens' positions; 0, 1, 2, ... unless given.
        """
        calls: list[Call] = []

        def record(hidden: Tensor, *args, **kwargs) -> Tensor:
            calls.append((args, kwargs))
            entered.append(hidden)
            return hidden

        entered: list[Tensor] = []
        with self._instead_of_layers(record):
            self._decoder(input_ids=input_ids, position_ids=positions, use_cache=False)
        return entered[0], calls

    def attend(self, layer: int, hidden: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """Run a layer up to its FFN: (the residual stream after attention, the FFN's input), both (B, P, d)."""
        ffn = self.ffns[layer]
        ffn.muted = True
        try:
            output = self.layers[layer](hidden, *call[0], **call[1])
            heard = ffn.heard
        finally:
            ffn.muted, ffn.heard = False, None
        assert heard is not None
        return (output[0] if isinstance(output, tuple) else output), heard

    def complete(self, layer: int, residual: Tensor, ffn_output: Tensor) -> Tensor:
        """What leaves the layer, (B, P, d): the FFN's output joins the residual stream."""
        module = self.layers[layer]
        if hasattr(module, "post_feedforward_layernorm"):  # Gemma, OLMo 2
            ffn_output = cast(nn.Module, module.post_feedforward_layernorm)(ffn_output)
        return residual + ffn_output * getattr(module, "residual_multiplier", 1.0)  # Granite scales it

    def normalized(self, hidden: Tensor) -> Tensor:
        """The model's own final norm of a residual stream: (B, P, d) to (B, P, d)."""
        with self._instead_of_layers(lambda _, *args, **kwargs: hidden):
            return self._decoder(inputs_embeds=hidden, use_cache=False).last_hidden_state

    def head(self, normalized: Tensor) -> Tensor:
        """The model's own head on a normalised stream: (B, P, d) to (B, P, V)."""
        decoder: Any = self._decoder
        decoder.forward = lambda *args, **kwargs: BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=normalized
        )
        try:
            return self.backbone(inputs_embeds=normalized, use_cache=False).logits
        finally:
            del decoder.forward

    def logits(self, hidden: Tensor) -> Tensor:
        """The prediction from a residual stream: (B, P, d) to (B, P, V)."""
        return self.head(self.normalized(hidden))

    def all_big(self, input_ids: Tensor) -> Tensor:
        """The residual stream after an all-big walk, (B, T) to (B, T, d)."""
        hidden, calls = self.embed(input_ids)
        for layer, call in enumerate(calls):
            residual, heard = self.attend(layer, hidden, call)
            hidden = self.complete(layer, residual, self.ffns[layer].big(heard))
        return hidden

    @contextmanager
    def _instead_of_layers(self, forward: Callable[..., Tensor]):
        for layer in self.layers:
            layer.forward = forward
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward  # the instance's; the class's own shows again
