"""transformers' own generate on a duo: what it gives the original, it gives all-big, padded batches included."""

import inspect

import pytest
import torch
from conftest import FAMILIES, ROUTED_ONLY, make_duo, make_original
from transformers import AutoConfig, AutoModelForCausalLM

import duorl
from duorl.routers import HeadRouter

_GREEDY = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
_SHORT = torch.tensor([[5, 6, 7, 8]])
_PADDED = torch.tensor([[0, 0, 0, 5, 6, 7, 8], [9, 4, 3, 11, 12, 2, 1]])
_MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])


def generated(model, tokens, mask=None, **options):
    """Greedy tokens (B, n) and their logits (B, n, V)."""
    mask = torch.ones_like(tokens) if mask is None else mask
    returned = {"output_logits": True, "return_dict_in_generate": True}
    found = model.generate(tokens, attention_mask=mask, **_GREEDY, **returned, **options)
    return found.sequences[:, tokens.shape[1] :], torch.stack(found.logits, dim=1)


@pytest.mark.parametrize("family", [*FAMILIES, *ROUTED_ONLY])
def test_a_left_padded_batch_is_the_originals_and_the_unpadded_one(family):
    original = make_original(family)
    duo = duorl.convert(original, small_ratio=4)
    written, logits = generated(duo, _PADDED, _MASK)
    expected, expected_logits = generated(original, _PADDED, _MASK)
    assert torch.equal(written, expected) and torch.allclose(logits, expected_logits, atol=1e-5)
    alone, alone_logits = generated(duo, _SHORT)
    assert torch.equal(written[:1], alone) and torch.allclose(logits[:1], alone_logits, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "bloom", "opt 350M"])
def test_padding_does_not_change_what_a_router_decides(family):
    duo, router = make_duo(family), HeadRouter(3, 32)
    written, logits = generated(duo, _PADDED, _MASK, router=router)
    alone, alone_logits = generated(duo, _SHORT, router=router)
    assert torch.equal(written[:1], alone) and torch.allclose(logits[:1], alone_logits, atol=1e-5)


def test_a_family_prepares_its_own_inputs():
    """Phi-3 throws its cache away where its rotary frequencies change, here at the ninth token."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 8, **factors}
    sizes = {**FAMILIES["phi3"], "original_max_position_embeddings": 8}
    torch.manual_seed(0)
    config = AutoConfig.for_model("phi3", rope_parameters=rope, **sizes)
    original = AutoModelForCausalLM.from_config(config).eval()
    expected, found = (generated(model, _PADDED[1:])[1] for model in (original, duorl.convert(original)))
    assert torch.allclose(found, expected, atol=1e-5)


def test_the_signature_names_what_every_family_takes(duo):
    """generate, Trainer and others hand on only what they find there."""
    shared = {"input_ids", "attention_mask", "position_ids", "inputs_embeds", "labels", "use_cache", "logits_to_keep"}
    for family in [*FAMILIES, *ROUTED_ONLY]:
        kind = AutoModelForCausalLM._model_mapping[type(AutoConfig.for_model(family))]
        ignored = {"position_ids"} if family == "bloom" else set()  # its positions follow from the mask
        assert shared - ignored <= set(inspect.signature(kind.forward).parameters), family
    assert shared <= set(inspect.signature(duo.forward).parameters)


def test_a_prompt_costs_one_heads_logits(duo, monkeypatch):
    heads = []
    head = duo.get_output_embeddings()
    monkeypatch.setattr(head, "forward", lambda x, own=head.forward: (heads.append(x.shape[1]), own(x))[1])
    generated(duo, _PADDED, _MASK)
    assert heads == [1, 1, 1]


def test_what_generates_is_told_as_the_original_was():
    original = make_original("llama")
    original.generation_config.eos_token_id = [3, 4]
    assert duorl.convert(original).generation_config.eos_token_id == [3, 4]


def test_duo_tiny_pads_and_its_text_keeps_its_tokens():
    tokenizer, model = duorl.load_tokenizer(), duorl.load()
    texts = ["def f(): return", "a", "<|endoftext|> x"]
    plain = [tokenizer.backend_tokenizer.encode(text).ids for text in texts]
    assert [tokenizer(text)["input_ids"] for text in texts] == plain and len(tokenizer) == 2048
    batch = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    assert tokenizer.pad_token_id == model.generation_config.pad_token_id == batch["input_ids"][1, 0] == 0
    written = model.generate(**batch, max_new_tokens=2, do_sample=False)
    alone = model.generate(torch.tensor([plain[1]]), max_new_tokens=2, do_sample=False)
    assert torch.equal(written[1, -2:], alone[0, -2:])
