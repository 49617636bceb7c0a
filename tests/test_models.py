"""The duo model against the unmodified Hugging Face model."""

import pytest
import torch
from conftest import FAMILIES, make_duo, make_original, random_routes
from transformers import AutoModelForCausalLM, OPTConfig

import duorl
from duorl.models import require_frozen


@pytest.mark.parametrize("family", FAMILIES)
def test_all_big_is_the_original(family, tokens):
    original = make_original(family)
    duo = duorl.convert(original, small_ratio=4)
    routes = torch.full((2, 8, duo.num_layers), 2)
    expected = original(input_ids=tokens).logits
    assert (duo(input_ids=tokens).logits - expected).abs().max() < 1e-5
    assert (duo(input_ids=tokens, routes=routes).logits - expected).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_all_small_is_a_plain_model_with_the_small_networks(family, tokens):
    duo = make_duo(family)
    plain = AutoModelForCausalLM.from_config(duo.config.small_backbone).eval()
    weights = {k.replace(".mlp.small.", ".mlp."): v for k, v in duo.backbone.state_dict().items() if ".big." not in k}
    plain.load_state_dict(weights)
    routes = torch.ones(2, 8, duo.num_layers, dtype=torch.long)
    assert (duo(input_ids=tokens, routes=routes).logits - plain(input_ids=tokens).logits).abs().max() < 1e-5


def test_grouped_execution_equals_computing_everything_and_selecting(duo):
    hidden = torch.randn(5, 7, 32)
    actions = torch.randint(3, (5, 7))
    ffn = duo.stack.ffns[0]
    everything = torch.stack([ffn.run(hidden, action) for action in range(3)], -1)
    expected = everything.gather(-1, actions[..., None, None].expand(5, 7, 32, 1)).squeeze(-1)
    assert torch.allclose(ffn.route(hidden, actions), expected, atol=1e-6)


def test_only_the_chosen_networks_run_and_only_on_their_tokens(duo, tokens, monkeypatch):
    seen = {}
    for name in ("small", "big"):
        module = getattr(duo.stack.ffns[1], name)
        monkeypatch.setattr(module, "forward", lambda x, n=name, f=module.forward: (seen.update({n: len(x)}), f(x))[1])
    routes = torch.zeros(2, 8, 3, dtype=torch.long)
    routes[0, :5, 1] = 2
    duo(input_ids=tokens, routes=routes)
    assert seen == {"big": 5}


def test_save_and_load_round_trip(duo, tokens, tmp_path):
    duo.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    routes = torch.randint(3, (2, 8, 3))
    expected = duo(input_ids=tokens, routes=routes).logits
    for loaded in (duorl.load(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path).eval()):
        assert torch.equal(loaded(input_ids=tokens, routes=routes).logits, expected)
    require_frozen(duorl.load(tmp_path))


def test_another_kind_of_model_is_refused(tmp_path):
    make_original("llama").save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="a model of type 'llama', not a duo"):
        duorl.load(tmp_path)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_half_precision_models_convert(family):
    assert duorl.convert(make_original(family).to(torch.bfloat16)).dtype == torch.bfloat16


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json, model\.safetensors, tokenizer\.json"):
        duorl.load(tmp_path)


def test_a_trainable_model_is_refused_by_name(duo):
    unfrozen = make_duo("llama")
    unfrozen.stack.ffns[1].big.up_proj.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.big\.up_proj\.weight is trainable"):
        require_frozen(unfrozen)


def test_a_family_without_mlp_modules_is_refused():
    config = OPTConfig(vocab_size=61, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4)
    with pytest.raises(ValueError, match="OPTForCausalLM: no decoder layers with an `mlp`"):
        duorl.convert(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize("bad", [torch.zeros(2, 8, 4).long(), torch.zeros(2, 7, 3).long(), torch.full((2, 8, 3), 3)])
def test_bad_routes_are_refused(duo, tokens, bad):
    with pytest.raises(ValueError, match="routes"):
        duo(input_ids=tokens, routes=bad)


def test_compute_is_the_share_of_the_big_networks_flops(duo):
    table = duo.action_compute
    assert torch.allclose(table[:, 2].sum(), torch.tensor(1.0))
    assert torch.allclose(table[:, 1] / table[:, 2], torch.tensor(0.25))
    assert table[:, 0].abs().max() == 0


def test_generation_with_a_router_repeats_the_full_pass(duo, tokens):
    """With a cache, step by step, a router of the hidden state decides as in one pass over the whole text."""

    def router(hidden, layer, compute):
        return (hidden.sum(-1) > 0).long() + 1

    prompt = tokens[:1, :4]
    written = duo.generate(prompt, router=router, max_new_tokens=4, do_sample=False)
    logits = duo(input_ids=written, router=router).logits
    assert torch.equal(logits[0, 3:-1].argmax(-1), written[0, 4:])


def test_routes_equal_a_router_that_replays_them(duo, tokens):
    routes = random_routes(duo, tokens)
    inputs = tokens[:, :-1]
    replay = duo(input_ids=inputs, router=lambda hidden, layer, compute: routes[..., layer]).logits
    assert torch.equal(replay, duo(input_ids=inputs, routes=routes).logits)
