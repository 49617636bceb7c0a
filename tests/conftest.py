"""Small random models of several families, and duo-tiny."""

import os
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoConfig, AutoModelForCausalLM

import duorl

_LLAMA_LIKE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_GPT_J_LIKE = {"vocab_size": 61, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
_GPT_NEO_ATTENTION = {"attention_types": [[["global", "local"], 1]], "window_size": 4, "max_position_embeddings": 64}
FAMILIES = {
    "llama": _LLAMA_LIKE,
    "qwen3": {**_LLAMA_LIKE, "head_dim": 8},
    "gpt2": {"vocab_size": 61, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "gpt_neox": _LLAMA_LIKE,
    "mistral": {**_LLAMA_LIKE, "sliding_window": 4},
    "gemma2": {**_LLAMA_LIKE, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4},
    "olmo2": _LLAMA_LIKE,
    "phi": {**_LLAMA_LIKE, "num_key_value_heads": 4},
    "granite": {**_LLAMA_LIKE, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "smollm3": {**_LLAMA_LIKE, "no_rope_layer_interval": 2},
    "codegen": {**_GPT_J_LIKE, "rotary_dim": 4},
    "exaone4": _LLAMA_LIKE,
    "gemma3_text": {**_LLAMA_LIKE, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4},
    "glm4": {**_LLAMA_LIKE, "head_dim": 8},
    "gpt_bigcode": {"vocab_size": 61, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "gptj": {**_GPT_J_LIKE, "rotary_dim": 4},
    "olmo3": {**_LLAMA_LIKE, "sliding_window": 4},
    "phi3": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "bloom": {"vocab_size": 61, "hidden_size": 32, "n_layer": 3, "n_head": 4},
    "cohere": _LLAMA_LIKE,
    "falcon": {**_LLAMA_LIKE, "ffn_hidden_size": 64},
    "helium": {**_LLAMA_LIKE, "head_dim": 8},
    "hyperclovax": {**_LLAMA_LIKE, "residual_multiplier": 0.5, "use_post_norm": True},
    "nemotron": _LLAMA_LIKE,
    "opt": {**_LLAMA_LIKE, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "stablelm": _LLAMA_LIKE,
    "starcoder2": _LLAMA_LIKE,
}
# Families whose attention does not go through transformers' attention interface.
ROUTED_ONLY = {
    "gpt_neo": {"vocab_size": 61, "hidden_size": 32, "num_layers": 2, "num_heads": 4, **_GPT_NEO_ATTENTION},
    "olmo_hybrid": _LLAMA_LIKE,
    "qwen3_5_text": {**_LLAMA_LIKE, "head_dim": 8, "layer_types": ["linear_attention", *["full_attention"] * 2]},
}


def make_original(family: str):
    """A random model of a family, with weights large enough that every module matters."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**FAMILIES, **ROUTED_ONLY}[family])
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def make_duo(family: str, small_ratio: int = 4):
    duo = duorl.convert(make_original(family), small_ratio=small_ratio)
    for ffn in duo.stack.ffns:
        for parameter in ffn.small.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return duo.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory):
    """A file of real text, read in a moment and long enough for all three splits."""
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    modules = sorted(Path(os.__file__).parent.glob("*.py"))[:40]
    path.write_text("\n".join(module.read_text("utf8") for module in modules))
    return str(path)


@pytest.fixture(scope="session")
def duo():
    """A random Llama duo of 3 layers, vocabulary 61."""
    return make_duo("llama")


@pytest.fixture
def tokens():
    """Two windows of 7 tokens to predict."""
    return torch.randint(61, (2, 8), generator=torch.Generator().manual_seed(1))


def random_routes(model, tokens, seed=0):
    shape = (len(tokens), tokens.shape[1] - 1, model.num_layers)
    return torch.randint(3, shape, generator=torch.Generator().manual_seed(seed))


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty cache of the hub, and no network; gives a function that puts a folder into it."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def kept(name):
        repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(COMMIT)
        (repository / "snapshots" / COMMIT).mkdir(parents=True)
        return repository / "snapshots" / COMMIT

    return kept
