"""DecoderStack: runs a Hugging Face decoder of any family layer by layer.

It uses two techniques. *Recorded calls*: the model's forward runs once with layers that only record their arguments
(masks, position embeddings). Then each layer is called with these arguments. *Bypassed FFN*: a bypassed `DuoFFN` adds
nothing, so the layer's output is the residual stream after attention. Adding the output of the chosen network completes
the layer. This works for sequential and for parallel residuals.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from duorl.models.calls import Arguments, BypassedFFN, GivenDecoderOutput, GivenStream, RecordedLayers, calling
from duorl.models.families import decoder_of, family_of, find_layers
from duorl.models.ffn import DuoFFN
from duorl.models.memory import active_memory
from duorl.models.past import through_cache


class DecoderStack:
    """The steps of a forward pass over a decoder whose layers' networks are `DuoFFN`s.

    `embed`, then per layer `attend` and `complete`, then `logits`.

    Attributes:
        family: names of the decoder's parts.
        layers: the decoder's layers.
        ffns: their two networks.
    """

    def __init__(self, backbone: PreTrainedModel):
        self.backbone = backbone
        self.family = family_of(backbone.config)
        self.layers = find_layers(backbone)
        self.ffns = [cast(DuoFFN, getattr(layer, self.family.ffn)) for layer in self.layers]
        self._decoder = decoder_of(backbone, self.layers)

    def embed(self, input_ids: Tensor, positions: Tensor | None = None) -> tuple[Tensor, list[Arguments]]:
        """Input of layer 0, (B, P, d), and arguments of each layer.

        Args:
            input_ids: (B, P).
            positions: (B, P), positions of the tokens; by default 0, 1, 2, ...
        """
        call = RecordedLayers(in_tuple=self.family.layer_returns_tuple)
        with calling(call):
            self._decoder(input_ids=input_ids, position_ids=positions, use_cache=False)
        assert call.entering is not None
        return call.entering, call.arguments

    def attend(self, layer: int, hidden: Tensor, arguments: Arguments) -> tuple[Tensor, Tensor]:
        """Run a layer up to its FFN: (the residual stream after attention, the FFN's input), both (B, P, d)."""
        call, memory = BypassedFFN(), active_memory()
        if memory is not None and self.family.cache_argument:
            arguments = through_cache(self.family, memory, hidden, arguments)
        with calling(call):
            output = self.layers[layer](hidden, *arguments[0], **arguments[1])
        output = output[0] if isinstance(output, tuple) else output
        ffn_input = call.captured.view_as(output)  # OPT's layers flatten it
        return self.family.residual(self.layers[layer], output, ffn_input), ffn_input

    def complete(self, layer: int, residual: Tensor, ffn_output: Tensor) -> Tensor:
        """Output of the layer, (B, P, d): the FFN's output is added to the residual stream."""
        return self.family.completed(self.layers[layer], residual, ffn_output)

    def normalized(self, hidden: Tensor) -> Tensor:
        """Apply the model's final norm to a residual stream: (B, P, d) to (B, P, d)."""
        embedded = hidden[..., : self.backbone.get_input_embeddings().embedding_dim]  # ignored; OPT 350M's are narrower
        with calling(GivenStream(hidden, in_tuple=self.family.layer_returns_tuple)):
            return self._decoder(inputs_embeds=embedded, use_cache=False).last_hidden_state

    def head(self, normalized: Tensor) -> Tensor:
        """Apply the model's head to a normalized stream: (B, P, d) to (B, P, V)."""
        output = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=normalized)
        with calling(GivenDecoderOutput(output)):
            return self.backbone(inputs_embeds=normalized, use_cache=False).logits

    def logits(self, hidden: Tensor) -> Tensor:
        """The prediction from a residual stream: (B, P, d) to (B, P, V)."""
        return self.head(self.normalized(hidden))

    def all_big(self, input_ids: Tensor) -> Tensor:
        """The residual stream after an all-big pass, (B, T) to (B, T, d)."""
        hidden, arguments = self.embed(input_ids)
        with calling(None):
            for layer, ffn in enumerate(self.ffns):
                residual, ffn_input = self.attend(layer, hidden, arguments[layer])
                hidden = self.complete(layer, residual, ffn(ffn_input))
        return hidden
