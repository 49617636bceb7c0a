"""Small random models of several families, duo-tiny, and what many tests of the command line use."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM

import duorl
from duorl.cli import main

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
    "biogpt": _LLAMA_LIKE,
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
# Families whose attention has no reference context.
ROUTED_ONLY = {
    "diffllama": {**_LLAMA_LIKE, "head_dim": 8},
    "gpt_neo": {"vocab_size": 61, "hidden_size": 32, "num_layers": 2, "num_heads": 4, **_GPT_NEO_ATTENTION},
    "olmo_hybrid": _LLAMA_LIKE,
    "qwen3_5_text": {**_LLAMA_LIKE, "head_dim": 8, "layer_types": ["linear_attention", *["full_attention"] * 2]},
}
# Families that need no entry in `duorl.models.families`, beside those in FAMILIES.
_ALIKE = ("apertus", "arcee", "bitnet", "cohere2", "ernie4_5", "gemma", "glm", "hunyuan_v1_dense")
_ALIKE += ("internlm3", "jais2", "ministral", "nanochat", "olmo", "persimmon", "seed_oss")
LIKE_LLAMA = {name: {**_LLAMA_LIKE, "head_dim": 8} for name in _ALIKE}
LIKE_LLAMA["cwm"] = {**LIKE_LLAMA["glm"], "sliding_window": 4, "bos_token_id": 1, "eos_token_id": 2}
LIKE_LLAMA["vaultgemma"] = {**LIKE_LLAMA["glm"], "sliding_window": 4, "query_pre_attn_scalar": 8}
# Models whose configuration builds other layers than the family's default.
VARIANTS = {
    "bloom, norm as residual": {**FAMILIES["bloom"], "apply_residual_connection_post_layernorm": True, "n_head": 2},
    "falcon 1B, alibi": {**FAMILIES["falcon"], "alibi": True, "parallel_attn": False, "multi_query": False},
    "falcon 40B": {**FAMILIES["falcon"], "new_decoder_architecture": True, "num_kv_heads": 2},
    "gpt_neox, sequential": {**FAMILIES["gpt_neox"], "use_parallel_residual": False},
    "opt 350M": {**FAMILIES["opt"], "do_layer_norm_before": False, "word_embed_proj_dim": 16},
    "stablelm, parallel": {**FAMILIES["stablelm"], "use_parallel_residual": True, "qk_layernorm": True},
}
_ALL = {**FAMILIES, **ROUTED_ONLY, **LIKE_LLAMA, **VARIANTS}

_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_VIT = {"depth": 1, "embed_dim": 16, "num_heads": 2}
_SMALL = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2}
_ATTENTION = {**_SMALL, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
_SEQ2SEQ = {"vocab_size": 61, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1}
_TEXT = {**_ATTENTION, "pad_token_id": None}
_NO_MLP, _NO_SIZE = "no decoder layers with an `mlp` module", "no single FFN inner size"
_PER_LAYER = {"vocab_size_per_layer_input": 61, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}
_PER_LAYER |= {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}
_MINICPM3 = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
_GEMMA3N = {"intermediate_size": [64, 64], "activation_sparsity_pattern": [0.0, 0.0], "laurel_rank": 4}
# What `duorl.convert` refuses: a configuration and the reason, in the words of the message and of the page Families.
REFUSED = {
    "bart": ({**_SEQ2SEQ, "encoder_attention_heads": 2, "decoder_attention_heads": 2}, "encoder-decoder"),
    "t5": (
        {"vocab_size": 61, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4},
        "encoder-decoder",
    ),
    "mamba": ({**_SMALL, "state_size": 4}, "state-space or recurrent layers"),
    "rwkv": (_SMALL, "state-space or recurrent layers"),
    "bert": ({**_ATTENTION, "is_decoder": True}, _NO_MLP),
    "ctrl": ({"vocab_size": 61, "n_embd": 32, "dff": 64, "n_layer": 2, "n_head": 4}, _NO_MLP),
    "granitemoe": ({**_TEXT, "num_local_experts": 4}, "mixtures of experts"),
    "mixtral": ({**_TEXT, "num_local_experts": 4}, "mixtures of experts"),
    "qwen2_moe": ({**_TEXT, "num_experts": 4, "moe_intermediate_size": 16}, "mixtures of experts"),
    "llava": ({"text_config": {"model_type": "llama", **_TEXT}, "vision_config": _VISION}, "reads more than text"),
    "qwen2_vl": (
        {"text_config": _TEXT, "vision_config": {"depth": 1, "embed_dim": 16, "num_heads": 2}},
        "more than text",
    ),
    "granite_swa": (_TEXT, "all-big differs from the original's logits"),
    "minicpm3": ({**_TEXT, "num_key_value_heads": 4, **_MINICPM3}, "all-big differs from the original's logits"),
    "mpt": ({"vocab_size": 61, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}, _NO_MLP),
    "xglm": ({"vocab_size": 61, "d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4}, _NO_MLP),
    "lfm2": ({**_TEXT, "layer_types": ["conv", "full_attention"]}, _NO_MLP),
    "openai-gpt": ({"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, _NO_SIZE),
    "gpt_neox_japanese": ({**_SMALL, "intermediate_multiple_size": 2, "num_attention_heads": 4}, _NO_SIZE),
    "gemma3n_text": ({**_TEXT, **_PER_LAYER, **_GEMMA3N}, _NO_SIZE),
    "moshi": ({**_SMALL, "num_attention_heads": 4, "ffn_dim": 64, "num_codebooks": 2}, _NO_SIZE),
    "gemma4_text": ({**_TEXT, **_PER_LAYER, "global_head_dim": 8}, "cannot be run layer by layer"),
}


def make_original(name: str):
    """A random model of a family or a variant, with weights large enough that every module matters."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name.split()[0].strip(","), **_ALL[name])
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def make_refused(name: str):
    """A random model of a kind that `duorl.convert` refuses."""
    config = AutoConfig.for_model(name, **REFUSED[name][0])
    kinds = AutoModelForSeq2SeqLM, AutoModelForCausalLM, AutoModelForImageTextToText
    return next(kind for kind in kinds if type(config) in kind._model_mapping).from_config(config)


def make_duo(family: str, small_ratio: int = 4):
    duo = duorl.convert(make_original(family), small_ratio=small_ratio)
    for ffn in duo.stack.ffns:
        for parameter in ffn.small.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return duo.eval().requires_grad_(False)


def pytest_configure(config):
    """What is searched once is kept for the whole run of the tests, and not in the home of who runs them."""
    if not hasattr(config, "workerinput"):  # workers inherit the folder
        config.cache_folder = TemporaryDirectory()
        os.environ["DUORL_CACHE"] = config.cache_folder.name


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        config.cache_folder.cleanup()


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


TINY = """
total_decisions: 20000
validations: 2
env: {windows_per_batch: 1, group_size: 2, window: 32}
evaluation:
  {windows: 4, reference_windows: 1, fixed_windows: 1, finalists: 2, final_windows: 2, batch: 4}
rivals:
  supervised: {class_path: Supervised, init_args: {windows: 1, epochs: 1}}
  soft: {class_path: Soft, init_args: {updates: 2}}
"""


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A configuration that runs in seconds, in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path


def refused(arguments, capsys) -> str:
    """The one line with which a command refuses its input."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("duorl: error: "), lines
    return lines[0]
