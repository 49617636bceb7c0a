"""DuoForCausalLM: a Hugging Face decoder with a big and a small feed-forward network in every layer."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.pytorch_utils import Conv1D

import duorl.models.attention  # noqa: F401  (registers the attention function that the families name)
from duorl import hub
from duorl.costs import ACTIONS, Flops, linear_flops
from duorl.inputs import View
from duorl.models.calls import RoutedCall, calling, let_ask
from duorl.models.config import DuoConfig
from duorl.models.families import attention_of, attention_width, decoder_of, family_of, find_layers, sized
from duorl.models.ffn import AddingDuoFFN, DuoFFN
from duorl.models.gateway import fresh_model
from duorl.models.generation import RoutedGenerationMixin
from duorl.models.scoped import uncompiled
from duorl.models.shared import (
    CARD,
    OF_MODEL,
    ROUTER,
    join,
    model_files,
    save_router,
    save_small,
    with_saved_router,
    writing_model,
)
from duorl.models.stack import DecoderStack
from duorl.models.transcript import RouterLike, begin, decision

_NOT_OF_BASE = {
    *hub.OPTIONS,
    *("config", "dtype", "torch_dtype", "revision", "subfolder", "output_loading_info", "use_safetensors"),
    *("attn_implementation", "trust_remote_code", "adapter_kwargs", "_from_auto", "_from_pipeline", "_commit_hash"),
}
"""Options of `from_pretrained` that loading a base model does not take: code from the hub, for example, never runs."""
_OF_HUB = ("private", "token", "commit_message", "create_pr", "revision")  # options of `save_pretrained` to send it


class DuoForCausalLM(PreTrainedModel, RoutedGenerationMixin):
    """The duo model of Duo-LLM (arXiv 2410.10846) with any decoder of transformers that `DecoderStack` can run.

    Without `routes` or `router`, every token takes the big network in every layer, as in the original model.

        model = duorl.load("duo-tiny")
        model(input_ids=x, routes=routes).logits          # routes (B, T, L), int64: 0 skip, 1 small, 2 big
        model(input_ids=x, router=router).logits
    """

    config_class = DuoConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = False  # the second pass of checkpointing would run without the routes
    _supports_sdpa = True

    def __init__(self, config: DuoConfig, backbone: PreTrainedModel | None = None):
        super().__init__(config)
        self.backbone = _steered_backbone(config) if backbone is None else backbone
        family, layers = family_of(config.backbone), find_layers(self.backbone)
        kind = AddingDuoFFN if family.adds_residual else DuoFFN
        for layer, small in zip(layers, _small_ffns(config), strict=True):
            _take_over(small, family.network(layer))
            family.replace(layer, kind(big=family.network(layer), small=small))
            let_ask(layer, "layer")
        let_ask(decoder_of(self.backbone, layers), "decoder")
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """As in transformers; if the folder has small networks alone, they are put together with their base model.

        Then `revision` and `subfolder` are those of the small networks, and the options of the hub (`hub.OPTIONS`) are
        for both. The rest is the base model's, for example `device_map`. `attn_implementation` has no effect: every
        family has its own, which the reference context needs. What does not fit is an error, so `output_loading_info`
        returns that nothing is missing.

        Raises:
            OSError, ValueError: see `duorl.models.shared.join`.
        """
        name, config, rest = pretrained_model_name_or_path, kwargs.get("config"), kwargs
        if name is not None and not isinstance(config, DuoConfig):
            given = {key: value for key, value in kwargs.items() if key != "config"}
            config, rest = DuoConfig.from_pretrained(config or name, return_unused_kwargs=True, **given)
        where = (kwargs.get("revision"), kwargs.get("subfolder"))
        with hub.using(**{option: kwargs[option] for option in hub.OPTIONS if option in kwargs}):
            if config is not None and config.base is not None:
                more = {option: value for option, value in rest.items() if option not in _NOT_OF_BASE}
                folder = model_files(name, *where)
                model = join(cls, folder, config, dtype=_named_dtype(kwargs), **more)
                found: dict[str, Any] = {f"{kind}_keys": set() for kind in ("missing", "unexpected", "mismatched")}
                found["error_msgs"] = []
            else:
                given = {**kwargs, "use_safetensors": True, "output_loading_info": True}
                model, found = cast(Any, super().from_pretrained(name, *args, **given))
                folder = name and model_files(name, *where, patterns=(f"*{ROUTER}/router.*",))
            model = with_saved_router(model, folder) if folder else model
        return (model, found) if kwargs.get("output_loading_info") else model

    def save_pretrained(  # type: ignore[override]
        self, save_directory: Any, *args: Any, push_to_hub: bool = False, repo_id: str | None = None, **kwargs: Any
    ) -> None:
        """Save the whole model, as in transformers. For the small networks alone see `duorl.models.save_small`.

        A view with a router is saved with the router. Loading the folder gives the view back. After an error, the
        folder is as it was.

        Raises:
            ValueError: the router is a function, or another object that cannot be saved.
        """
        whole = copy.copy(self)  # other threads may read the configuration
        whole.config = copy.deepcopy(self.config)
        whole.config.base = None
        sent = {option: kwargs.pop(option) for option in _OF_HUB if push_to_hub and option in kwargs}
        with writing_model(save_directory, beside_others=kwargs.get("variant") is not None) as beside:
            super(DuoForCausalLM, whole).save_pretrained(beside, *args, **kwargs)
            if any(beside.iterdir()):  # of several processes, one writes
                save_router(self, beside)
        if push_to_hub:
            patterns = [*OF_MODEL, f"{ROUTER}/*"]
            hub.push(save_directory, repo_id or Path(save_directory).name, allow_patterns=patterns, **sent)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Moves the router of a view with the model."""
        moved = super()._apply(*args, **kwargs)
        if isinstance(self.own_router, nn.Module):
            self.own_router.to(self.device)
        return moved

    def push_to_hub(  # type: ignore[override]
        self, repo_id: str, *, private: bool | None = None, token: Any = None, **more: Any
    ) -> str:
        """Send the model to the Hugging Face hub, with the card of the folder that it was loaded from.

        A model that was put together from small networks and their base model is sent as it came: without the base.

        Args:
            repo_id: `owner/name`; the repository is made if there is none.
            private: whether a new repository is private.
            token: of the hub; by default that of `hf auth login`.
            more: further arguments of `huggingface_hub.HfApi.upload_folder`, for example `commit_message`.

        Returns:
            The address of the commit.

        Raises:
            OSError: the hub cannot be reached, or refuses it.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder) if self.config.base is None else save_small(self, folder, shared=True)
            for name in CARD:
                if (card := Path(self.name_or_path or "") / name).is_file():
                    shutil.copy(card, folder)
            return hub.push(folder, repo_id, private=private, token=token, **{"commit_message": "Upload model", **more})

    def _init_weights(self, module: nn.Module) -> None:
        self.backbone._init_weights(module)

    def with_router(self, router: RouterLike | None) -> DuoForCausalLM:
        """A view of the model that follows a router, wherever it is not given routes or another router.

        The view is a model like any other, for pipelines and evaluators that know nothing of routing. It shares all
        weights and settings with this model. It is saved, sent and moved with its router; None: without one.

        Raises:
            ValueError: the router was made for another model.
        """
        if require_fit := getattr(router, "require_fit", None):
            require_fit(self)
        view = copy.copy(self)
        view.__dict__["own_router"] = router  # not a module: the model's weights stay what they are
        return view

    @property
    def stack(self) -> DecoderStack:
        """The steps of a pass, layer by layer."""
        return DecoderStack(self.backbone)

    @property
    def num_layers(self) -> int:
        """Number of layers, L."""
        return len(find_layers(self.backbone))

    @property
    def most_positions(self) -> int | None:
        """Number of positions that the model knows; None: it sets no bound."""
        return getattr(self.config.backbone, "max_position_embeddings", None)

    @property
    def hidden_size(self) -> int:
        """Size d of the residual stream."""
        return self.config.backbone.hidden_size

    @cached_property
    def flops(self) -> Flops:
        """FLOPs of one token in each part of the model."""
        config, stack = self.config.backbone, self.stack
        return Flops(
            projections=torch.tensor([linear_flops(attention_of(layer, config)) for layer in stack.layers]),
            width=attention_width(config),
            ffns=torch.tensor(
                [[0, linear_flops(ffn.small), linear_flops(ffn.big)] for ffn in stack.ffns], dtype=torch.float64
            ),
            head=linear_flops(self.backbone.get_output_embeddings()),
        )

    @property
    def action_compute(self) -> Tensor:
        """Compute of each action in each layer, (L, 3); big sums to 1 over the layers (see `duorl.costs`)."""
        return self.flops.compute.to(self.device, non_blocking=True)

    def route_compute(self, routes: Tensor) -> Tensor:
        """Compute of routes (..., L), action codes: (...)."""
        return self.action_compute[torch.arange(self.num_layers, device=routes.device), routes].sum(-1)

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        routes: Tensor | None = None,
        router: RouterLike | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """The backbone's forward pass with routed feed-forward networks.

        The arguments that all families have are in the signature, because transformers reads it. It passes only these
        to the model, and keeps only these columns of a data set.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T), 0 where padded.
            position_ids: (B, T), the tokens' positions; 0, 1, 2, ... unless given.
            inputs_embeds: (B, T, d), in place of `input_ids`.
            labels: (B, T), the tokens themselves; -100 is not scored.
            use_cache: return keys and values.
            logits_to_keep: number of last positions whose logits are computed, or their indices; 0: all.
            routes: (B, T, L) int64, action of each token in each layer: 0 skip, 1 small, 2 big.
            router: decides layer by layer, in place of `routes`; see `RouterLike`.
            kwargs: further ones of the backbone (its cache, ...).

        Returns:
            The backbone's output, with `loss` in nats per token if `labels` are given.

        Raises:
            ValueError: both `routes` and `router` are given, or `routes` has the wrong shape or codes.
        """
        if routes is not None and router is not None:
            raise ValueError("give routes or a router, not both")
        if routes is None and router is None:
            router = self.own_router
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
            **kwargs,
        }
        if routes is None and router is None:
            return self.backbone(**inputs)
        return self._routed(routes, router, inputs)

    @uncompiled  # which networks run follows from numbers
    def _routed(
        self, routes: Tensor | None, router: RouterLike | None, inputs: dict[str, Any]
    ) -> CausalLMOutputWithPast:
        """A pass that follows routes or a router."""
        decide = self._following(routes, inputs["input_ids"]) if router is None else self._decided_by(router, inputs)
        with calling(RoutedCall(decide, self.action_compute, drops_blocks=self.config.skip == "block")):
            return self.backbone(**inputs)

    def _decided_by(self, router: RouterLike, inputs: dict[str, Any]) -> Callable[[View], Tensor]:
        if require_fit := getattr(router, "require_fit", None):
            require_fit(self)
        cache = inputs.get("cache", inputs.get("past_key_values"))
        if cache is None or not int(cache.get_seq_length()):
            begin(router, self, _tokens(inputs["input_ids"], inputs["inputs_embeds"]))
        return decision(router)

    def _following(self, routes: Any, input_ids: Tensor | None) -> Callable[[View], Tensor]:
        """The decisions of checked routes (B, T, L)."""
        if routes.ndim != 3 or routes.shape[2] != self.num_layers:
            raise ValueError(f"routes must have shape (B, T, {self.num_layers}), not {tuple(routes.shape)}")
        if input_ids is not None and routes.shape[:2] != input_ids.shape:
            raise ValueError(f"routes are for {tuple(routes.shape[:2])} tokens, input_ids for {tuple(input_ids.shape)}")
        if routes.min() < 0 or routes.max() >= len(ACTIONS):
            raise ValueError(f"routes hold codes 0 to {len(ACTIONS) - 1} ({', '.join(ACTIONS)})")
        return lambda view: routes[..., view.layer]

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's token embedding."""
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the backbone's token embedding."""
        self.backbone.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The backbone's head."""
        return self.backbone.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the backbone's head."""
        self.backbone.set_output_embeddings(value)
        self.__dict__.pop("flops", None)  # to be counted again

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """The backbone's own, which keeps its number of tokens for the loss; the FLOPs of the head are counted anew."""
        self.__dict__.pop("flops", None)
        return self.backbone.resize_token_embeddings(*args, **kwargs)


def _tokens(input_ids: Tensor | None, embeddings: Tensor | None) -> Tensor:
    """The tokens of a pass, (B, T); (B, 0) for embeddings."""
    if input_ids is not None:
        return input_ids
    return torch.empty(0 if embeddings is None else len(embeddings), 0, dtype=torch.int64)


def _named_dtype(given: dict[str, Any]) -> torch.dtype | None:
    """The precision in options of `from_pretrained`; None if it is `auto`, or not given."""
    dtype = given.get("dtype", given.get("torch_dtype"))
    return getattr(torch, dtype, None) if isinstance(dtype, str) else dtype


def _steered_backbone(config: DuoConfig) -> PreTrainedModel:
    """The decoder, with our attention function if the family allows it."""
    function = family_of(config.backbone).attention_function
    config.backbone._attn_implementation = function
    try:
        return fresh_model(config.backbone, attn_implementation=function)
    except KeyError as problem:
        family = config.backbone.model_type
        if problem.args != (function,):
            raise ValueError(f"{family}: transformers knows no {problem}, which its configuration names") from problem
        raise ValueError(
            f"{family}: attention bypasses transformers' attention interface: name one of the family's own in "
            "duorl.models.families"
        ) from problem


def _small_ffns(config: DuoConfig) -> list[nn.Module]:
    """Feed-forward networks of the same decoder with the small inner size and new weights."""
    with torch.device("meta"):  # the rest of this decoder is not allocated
        skeleton = fresh_model(config.small_backbone)
    family = family_of(config.backbone)
    ffns = [family.network(layer) for layer in find_layers(skeleton)]
    if family.inner_size is None:
        ffns = [sized(ffn, config.small_size) for ffn in ffns]
    if torch.empty(0).device.type == "meta":  # from_pretrained builds on meta and loads the weights itself
        return ffns
    for ffn in ffns:
        ffn.to_empty(device=torch.empty(0).device)
        ffn.apply(skeleton._init_weights)
    return ffns


@torch.no_grad()
def _take_over(small: nn.Module, big: nn.Module) -> None:
    """Give a small network what belongs to none of its linear maps, such as the numbers of Apertus' activation."""
    for name, module in small.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            continue
        known = big.get_submodule(name)
        for own, other in (
            (module.named_parameters(recurse=False), dict(known.named_parameters(recurse=False))),
            (module.named_buffers(recurse=False), dict(known.named_buffers(recurse=False))),
        ):
            for part, tensor in own:
                if part in other and other[part].shape == tensor.shape and not other[part].is_meta:
                    tensor.copy_(other[part])


AutoModelForCausalLM.register(DuoConfig, DuoForCausalLM)
