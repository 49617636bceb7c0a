"""Models for measurements of time: duo models, and random weights in the shape of larger ones."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import duorl
from duorl.models import DuoForCausalLM

SHAPES = {
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9},
    "1b": {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 12, "num_attention_heads": 20},
    "8b, 8 layers": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 8},
}
"""By name. `1b` is the size of the Duo-LLM paper, `8b, 8 layers` a quarter of Llama 3's."""


def load(name: str, dtype: torch.dtype, device: str = "cpu") -> DuoForCausalLM:
    """A frozen duo model: random weights of a shape, or what `duorl.load` knows."""
    if name not in SHAPES:
        return duorl.load(name, dtype=dtype, device=device)
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[name], vocab_size=32000, eos_token_id=None, dtype=dtype)
    with torch.device(device):
        original = LlamaForCausalLM(config).to(dtype).eval()
    return duorl.convert(original).eval().requires_grad_(False)
