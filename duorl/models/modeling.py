"""DuoForCausalLM: a Hugging Face decoder with a big and a small feed-forward network in every layer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from duorl.costs import ACTIONS, SKIP, Flops, linear_flops
from duorl.models.attention import STEERED
from duorl.models.config import DuoConfig
from duorl.models.ffn import Decision, DuoFFN
from duorl.models.stack import DecoderStack, find_layers

if TYPE_CHECKING:
    RouterLike = Callable[[Tensor, int, Tensor], Tensor]


class DuoForCausalLM(PreTrainedModel, GenerationMixin):
    """The duo model of Duo-LLM (arXiv 2410.10846) over any decoder of transformers that `DecoderStack` can walk.

    Without `routes` or `router` every token takes the big network in every layer: the model it was made from.

        model = duorl.load("duo-tiny")
        model(input_ids=x, routes=routes).logits          # routes (B, T, L), int64: 0 skip, 1 small, 2 big
        model(input_ids=x, router=router).logits
    """

    config_class = DuoConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = False  # its second pass would run without the routes
    _supports_sdpa = True

    def __init__(self, config: DuoConfig):
        super().__init__(config)
        config.backbone._attn_implementation = STEERED
        self.backbone = AutoModelForCausalLM.from_config(config.backbone, attn_implementation=STEERED)
        small = _small_ffns(config)
        for layer, small_ffn in zip(find_layers(self.backbone), small, strict=True):
            layer.mlp = DuoFFN(big=cast(nn.Module, layer.mlp), small=small_ffn)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        self.backbone._init_weights(module)

    @property
    def stack(self) -> DecoderStack:
        """The model as a walk over its layers."""
        return DecoderStack(self.backbone)

    @property
    def num_layers(self) -> int:
        """L."""
        return len(find_layers(self.backbone))

    @property
    def hidden_size(self) -> int:
        """Size d of the residual stream."""
        return self.config.backbone.hidden_size

    @cached_property
    def flops(self) -> Flops:
        """FLOPs of one token, part by part."""
        config, stack = self.config.backbone, self.stack
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return Flops(
            projections=torch.tensor([linear_flops(_attention(layer)) for layer in stack.layers]),
            width=head_size * config.num_attention_heads,
            ffns=torch.tensor(
                [[0, linear_flops(ffn.small), linear_flops(ffn.big)] for ffn in stack.ffns], dtype=torch.float64
            ),
            head=linear_flops(self.backbone.get_output_embeddings()),
        )

    @property
    def action_compute(self) -> Tensor:
        """Compute of each action in each layer, (L, 3); big sums to 1 over the layers (see `duorl.costs`)."""
        return self.flops.compute.to(self.device)

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        routes: Tensor | None = None,
        router: RouterLike | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """The backbone's forward pass with routed feed-forward networks.

        Args:
            input_ids: (B, T).
            routes: (B, T, L) int64, each token's action in each layer: 0 skip, 1 small, 2 big.
            router: decides in place of `routes`, from (hidden (B, T, d), layer, compute so far (B, T)).
            kwargs: the backbone's own (`attention_mask`, `labels`, `past_key_values`, ...).

        Returns:
            The backbone's output; `loss` in nats per token where `labels` are given.

        Raises:
            ValueError: both `routes` and `router` are given, or `routes` has the wrong shape or codes.
        """
        if routes is not None and router is not None:
            raise ValueError("give routes or a router, not both")
        if routes is not None:
            self._check_routes(routes, input_ids)
        with self._deciding(routes, router):
            return self.backbone(input_ids=input_ids, **kwargs)

    def _check_routes(self, routes: Tensor, input_ids: Tensor | None) -> None:
        if routes.ndim != 3 or routes.shape[2] != self.num_layers:
            raise ValueError(f"routes must have shape (B, T, {self.num_layers}), not {tuple(routes.shape)}")
        if input_ids is not None and routes.shape[:2] != input_ids.shape:
            raise ValueError(f"routes are for {tuple(routes.shape[:2])} tokens, input_ids for {tuple(input_ids.shape)}")
        if routes.min() < 0 or routes.max() >= len(ACTIONS):
            raise ValueError(f"routes hold codes 0 to {len(ACTIONS) - 1} ({', '.join(ACTIONS)})")

    @contextmanager
    def _deciding(self, routes: Tensor | None, router: RouterLike | None):
        """Set every layer's `decide` for one forward pass."""
        if routes is None and router is None:
            yield
            return
        ffns, layers = self.stack.ffns, self.stack.layers
        spent = _Spending(self.action_compute)
        hooks = []
        for index, (ffn, layer) in enumerate(zip(ffns, layers, strict=True)):
            ffn.decide = _replay(routes, index) if router is None else spent.decide_with(router, index)
            if self.config.skip == "block":
                ffn.decide = dropping = _Dropping(ffn.decide)
                hooks.append(layer.register_forward_hook(dropping.undo))
        try:
            yield
        finally:
            for ffn in ffns:
                ffn.decide = None
            for hook in hooks:
                hook.remove()

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's token embedding."""
        return self.backbone.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The backbone's head."""
        return self.backbone.get_output_embeddings()


class _Spending:
    """Compute so far, (B, T), which a router sees, carried from layer to layer of one forward pass."""

    def __init__(self, action_compute: Tensor):
        self.action_compute = action_compute
        self.compute: Tensor | None = None

    def decide_with(self, router: RouterLike, layer: int) -> Callable[[Tensor], Tensor]:
        def decide(hidden: Tensor) -> Tensor:
            before = hidden.new_zeros(hidden.shape[:-1]) if self.compute is None else self.compute
            actions = router(hidden, layer, before)
            self.compute = before + self.action_compute[layer][actions]
            return actions

        return decide


class _Dropping:
    """Decides, and then takes back what a whole skipped layer added to the residual stream."""

    def __init__(self, decide: Decision):
        self.decide = decide

    def __call__(self, hidden: Tensor) -> Tensor:
        self.actions = self.decide(hidden)
        return self.actions

    def undo(self, layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """A forward hook of the layer."""
        return torch.where((self.actions == SKIP)[..., None], arguments[0], output)


def _replay(routes: Tensor | None, layer: int) -> Callable[[Tensor], Tensor]:
    assert routes is not None
    return lambda hidden: routes[..., layer]


def _attention(layer: nn.Module) -> nn.Module:
    named = [module for name, module in layer.named_children() if "attn" in name or name == "attention"]
    return named[0]


def _small_ffns(config: DuoConfig) -> list[nn.Module]:
    """The layers' `mlp` modules of the same decoder with the small inner size, freshly initialised."""
    with torch.device("meta"):  # the rest of that decoder is never allocated
        skeleton = AutoModelForCausalLM.from_config(config.small_backbone)
    ffns = [cast(nn.Module, layer.mlp) for layer in find_layers(skeleton)]
    if torch.empty(0).device.type == "meta":  # from_pretrained builds on meta and loads the weights itself
        return ffns
    for ffn in ffns:
        ffn.to_empty(device=torch.empty(0).device)
        ffn.apply(skeleton._init_weights)
    return ffns


AutoConfig.register("duo", DuoConfig)
AutoModelForCausalLM.register(DuoConfig, DuoForCausalLM)
