"""The duo model against the unmodified Hugging Face model."""

import copy
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import (
    FAMILIES,
    LIKE_LLAMA,
    REFUSED,
    ROUTED_ONLY,
    VARIANTS,
    make_duo,
    make_original,
    make_refused,
    random_routes,
)
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import duorl
from duorl.inputs import View
from duorl.models import families, require_frozen
from duorl.models.bases import find_base
from duorl.routed_pass import RoutedPass


@pytest.mark.parametrize("family", [*FAMILIES, *ROUTED_ONLY, *LIKE_LLAMA, *VARIANTS])
def test_all_big_is_the_original(family, tokens):
    original = make_original(family)
    duo = duorl.convert(original, small_ratio=4)
    routes = torch.full((2, 8, duo.num_layers), 2)
    expected = original(input_ids=tokens).logits
    assert (duo(input_ids=tokens).logits - expected).abs().max() < 1e-5
    assert (duo(input_ids=tokens, routes=routes).logits - expected).abs().max() < 1e-5
    own = families.family_of(original.config)
    for layer, ffn in zip(families.find_layers(original), duo.stack.ffns, strict=True):
        given, big = own.network(layer).state_dict(), ffn.big.state_dict()
        assert given.keys() == big.keys() and all(map(torch.equal, given.values(), big.values()))


def maps(network, inner):
    """(inputs, outputs) of a network's linear maps, in the unit of its inner size where they are not d."""
    linear = [module for module in network.modules() if isinstance(module, nn.Linear | Conv1D)]
    shapes = [module.weight.shape if isinstance(module, Conv1D) else module.weight.T.shape for module in linear]
    return sorted(tuple("d" if size == 32 else f"{size / inner:g}" for size in shape) for shape in shapes)


@pytest.mark.parametrize("family", [*FAMILIES, *ROUTED_ONLY])
def test_small_networks_are_small_ones_of_the_same_kind(family, tokens, tmp_path):
    """Of maps d to inner and one of inner to d, so that neurons can be chosen; initialised; saved, and loaded again."""
    torch.manual_seed(0)
    duo = duorl.convert(make_original(family), small_ratio=8)
    inner, ffns = duo.config.small_size, duo.stack.ffns
    for ffn in ffns:
        found = maps(ffn.small, inner)
        assert found == maps(ffn.big, 8 * inner)
        assert found in ([("1", "d"), *[("d", "1")] * n] for n in (1, 2)) or found == [("1", "d"), ("d", "2")]
        assert all(0.005 < weight.std() < 0.1 for weight in ffn.small.parameters() if weight.ndim == 2)
    flops, columns = duo.flops, sum(int(size) for shape in found for size in shape if size != "d")
    assert (flops.projections > 0).all() and flops.width == 32
    assert flops.ffns.tolist() == [[0, 2 * 32 * inner * columns, 2 * 32 * 8 * inner * columns]] * len(ffns)
    routes = torch.randint(3, (2, 8, duo.num_layers))
    expected = duo(input_ids=tokens, routes=routes).logits
    duo.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert all(map(torch.equal, loaded.state_dict().values(), duo.state_dict().values()))
    assert torch.allclose(loaded(input_ids=tokens, routes=routes).logits, expected, atol=1e-6)


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
    with pytest.raises(ValueError, match=r"'llama', not a duo: make one with `duorl convert --model .* --out DIR`"):
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


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_converted_is_refused_with_the_reason(name):
    with pytest.raises(ValueError, match=REFUSED[name][1]) as refused:
        duorl.convert(make_refused(name))
    assert "\n" not in str(refused.value)


def test_a_family_with_and_without_experts_is_asked_which_it_is():
    families.require_no_experts(AutoConfig.for_model("doge"))
    with pytest.raises(ValueError, match=r"doge: its networks are mixtures of experts, .*: give a model with one"):
        families.require_no_experts(AutoConfig.for_model("doge", is_moe=True))


@pytest.mark.parametrize("name", ["t5", "llava", "mixtral"])
def test_a_base_model_is_refused_before_its_weights_are_read(name, tmp_path):
    make_refused(name).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=f"cannot load the model of {tmp_path}: {name}.*{REFUSED[name][1]}"):
        find_base(tmp_path).load()


def quantized(model):
    """As bitsandbytes leaves it: a weight of bytes, in a shape of its own."""
    packed = torch.zeros(512, 1, dtype=torch.uint8)
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(packed, requires_grad=False)
    return model


def told(model, **settings):
    for name, value in settings.items():
        setattr(model.config, name, value)
    return model


def with_adapters(model):
    """As PEFT leaves it: the projection is inside of another module."""
    attention = model.model.layers[0].self_attn
    attention.q_proj = nn.ModuleDict({"base_layer": attention.q_proj})
    return model


@pytest.mark.parametrize(
    "change, reason",
    [
        (quantized, r"model\.layers\.1\.mlp\.up_proj\.weight is uint8: quantized weights cannot be copied"),
        (
            lambda m: told(m, quantization_config={"quant_method": "gptq"}),
            r"llama: its weights are quantized \(gptq\) and cannot be copied: give the unquantized model",
        ),
        (lambda m: m.model, "LlamaModel does not predict the next token: .* AutoModelForCausalLM"),
        (lambda m: m.to("meta"), r"model\.embed_tokens\.weight is not in memory"),
        (lambda m: m.lm_head, "convert takes a causal language model of transformers, not a Linear"),
        (duorl.convert, "the model is a duo already"),
        (with_adapters, r"layers\.0\.self_attn\.q_proj\.weight is not what .* merge adapters"),
        (lambda m: told(m, hidden_act="silly"), "silly"),
    ],
)
def test_a_model_that_is_not_as_its_family_is_refused(change, reason):
    with pytest.raises((ValueError, KeyError), match=reason):
        duorl.convert(change(make_original("llama")))


def test_a_family_that_computes_something_else_is_refused_with_the_difference(monkeypatch):
    monkeypatch.delitem(families.FAMILIES, "granite")
    with pytest.raises(ValueError, match=r"GraniteForCausalLM: all-big differs .* by \d\.\de-01 of their size"):
        duorl.convert(make_original("granite"))


def test_numbers_that_are_not_finite_are_named():
    original = make_original("llama")
    original.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"^Llama\w+: model\.layers\.1\.mlp\.down_proj\.weight holds numbers"):
        duorl.convert(original)
    original = make_original("llama").half()
    original.model.norm.weight.data.fill_(60_000)
    with pytest.raises(ValueError, match="logits are not finite in float16, although its weights are: load it in"):
        duorl.convert(original)


def test_layers_with_norms_after_their_sums_are_not_skipped_as_blocks():
    with pytest.raises(ValueError, match="its norms come after its sums, so use skip='ffn'"):
        duorl.convert(make_original("opt 350M"), skip="block")


def test_what_comes_from_a_gguf_is_plain_numbers(tmp_path):
    """transformers dequantizes it, and keeps the method in the configuration."""
    original = told(make_original("llama"), quantization_config={"quant_method": "gguf"})
    duorl.convert(original).save_pretrained(tmp_path)
    assert "quant" not in (tmp_path / "config.json").read_text()


def test_a_family_with_an_attention_of_its_own_is_refused_unless_it_is_listed(monkeypatch):
    monkeypatch.delitem(families.FAMILIES, "gpt_neo")
    with pytest.raises(ValueError, match="gpt_neo: attention bypasses transformers' attention interface"):
        duorl.convert(make_original("gpt_neo"))


def test_every_listed_family_is_in_the_tests_table():
    assert set(families.FAMILIES) <= {*FAMILIES, *ROUTED_ONLY}


def test_the_page_lists_what_the_tests_convert_and_refuse():
    page = (Path(__file__).parent.parent / "docs" / "reference" / "families.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    listed: dict[str, set[str]] = {}
    for row in rows:
        listed.setdefault(row[2], set()).update(re.findall("`(\\w+)`", row[0]))
    cached = {name for name, family in families.FAMILIES.items() if family.cache_argument}
    assert listed["both"] == {*FAMILIES, *LIKE_LLAMA} - cached
    assert listed["both, through the cache"] == cached
    assert listed["routed"] == set(ROUTED_ONLY)
    reasons = {name: row[0] for row in rows for name in re.findall(r"`([\w-]+)`", row[1])}
    assert reasons.keys() == REFUSED.keys()
    assert all(reason in reasons[name] for name, (_, reason) in REFUSED.items())


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


def test_a_router_sees_the_pass(duo, tokens):
    """`decide` gets views, as along a RoutedPass."""
    views: list[View] = []

    class Watching:
        def decide(self, view):
            views.append(view)
            return routes[..., view.layer]

    inputs, routes = tokens[:, :-1], random_routes(duo, tokens)
    logits = duo(input_ids=inputs, router=Watching()).logits
    assert torch.equal(logits, duo(input_ids=inputs, routes=routes).logits)
    walk = duorl.RoutedPass(duo, tokens)
    for seen in views:
        expected = walk.view
        assert (seen.layer, seen.price) == (expected.layer, None)
        assert torch.allclose(seen.hidden, expected.hidden, atol=1e-5)
        assert torch.allclose(seen.compute, expected.compute)
        assert all(map(torch.equal, seen.taken, expected.taken)) and len(seen.taken) == seen.layer
        assert (seen.previous is None) == (expected.previous is None)
        walk.step(routes[..., walk.layer])
    assert walk.done and torch.allclose(views[1].previous, views[0].hidden)


def test_a_router_may_run_the_model_itself(duo, tokens):
    """What it runs is a call of its own: all-big."""
    expected = duo(input_ids=tokens).logits

    def router(hidden, layer, compute):
        assert torch.equal(duo(input_ids=tokens).logits, expected)
        return torch.zeros(hidden.shape[:-1], dtype=torch.long)

    assert not torch.allclose(duo(input_ids=tokens, router=router).logits, expected)


def test_a_skipped_block_leaves_the_stream_as_it_entered(tokens):
    duo = make_duo("llama")
    duo.config.skip = "block"
    nothing = duo(input_ids=tokens, routes=torch.zeros(2, 8, 3, dtype=torch.long)).logits
    assert torch.equal(nothing, duo.stack.logits(duo.get_input_embeddings()(tokens)))


def test_copies_decide_as_the_model_does(duo, tokens):
    routes = random_routes(duo, tokens)
    expected = duo(input_ids=tokens[:, :-1], routes=routes).logits
    for copied in (copy.deepcopy(duo), pickle.loads(pickle.dumps(duo))):
        assert type(copied.stack.layers[0]) is type(duo.stack.layers[0])
        assert copied.stack.layers[0] is not duo.stack.layers[0]
        assert torch.equal(copied(input_ids=tokens[:, :-1], routes=routes).logits, expected)


def test_layers_are_of_the_familys_own_classes(duo):
    """transformers and accelerate ask for classes by `isinstance` and by name."""
    plain = make_original("llama")
    for ours, own in ((duo.stack.layers[0], plain.model.layers[0]), (duo.backbone.model, plain.model)):
        assert isinstance(ours, type(own)) and type(ours).__name__ == type(own).__name__
    assert duo._no_split_modules == {"LlamaDecoderLayer"}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "falcon"])  # heads of their own, and tied ones
def test_resized_embeddings_are_resized_everywhere(family, tmp_path):
    duo = make_duo(family)
    before = duo.flops.head
    duo.resize_token_embeddings(70, mean_resizing=False)
    assert duo.config.vocab_size == duo.backbone.config.vocab_size == 70
    assert duo.flops.head == before * 70 // 61
    tokens = torch.tensor([[65, 3, 69]])
    found = duo(input_ids=tokens, labels=tokens)
    expected = cross_entropy(found.logits[0, :-1], tokens[0, 1:])
    assert found.logits.shape == (1, 3, 70) and torch.allclose(found.loss, expected)
    assert RoutedPass(duo, tokens).inputs.shape == (1, 2)
    duo.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.vocab_size == 70 and torch.equal(loaded(input_ids=tokens).logits, found.logits)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neo", "falcon"])
def test_the_configuration_answers_for_the_decoders(family):
    """Under the names that other libraries ask for, whatever the family calls them."""
    original, config = make_original(family).config, make_duo(family).config
    names = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"]
    names += ["eos_token_id", "pad_token_id", "tie_word_embeddings", *original.attribute_map]
    for asked in (config, config.get_text_config(), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert {name: getattr(asked, name) for name in names} == {name: getattr(original, name) for name in names}
    for optional in ("head_dim", "num_key_value_heads", "sliding_window", "text_config"):
        assert hasattr(config, optional) == hasattr(original, optional)
    assert config.model_type == "duo"


def test_a_setting_of_the_decoders_is_set_there(tmp_path):
    config = make_duo("gpt2").config
    config.max_position_embeddings = 99
    config.pad_token_id = 5
    config.small_size, config.note = 7, "mine"
    assert (config.backbone.n_positions, config.backbone.pad_token_id) == (99, 5)
    assert not hasattr(config.backbone, "small_size") and not hasattr(config.backbone, "note")
    config.save_pretrained(tmp_path)
    read = AutoConfig.from_pretrained(tmp_path)
    assert (read.backbone.to_dict(), read.note) == (config.backbone.to_dict(), "mine") and read.small_size == 7
    assert AutoConfig.from_pretrained(tmp_path, vocab_size=99).backbone.vocab_size == 99
    with pytest.raises(AttributeError, match="no attribute 'gone'"):
        _ = config.gone


def test_damaged_folders_are_refused_by_name(duo, tmp_path):
    duo.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:100])
    with pytest.raises(ValueError, match="cannot read the weights in"):
        duorl.load(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config)[:50])
    with pytest.raises(ValueError, match=r"cannot read .*config\.json"):
        duorl.load(tmp_path)


_PEAK = """
import torch
from transformers import AutoConfig, AutoModelForCausalLM
import duorl

def memory(which):
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(which))

sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 2, "num_attention_heads": 8}
config = AutoConfig.for_model("llama", vocab_size=8000, **sizes)
model = AutoModelForCausalLM.from_config(config).bfloat16()
tiny = AutoConfig.for_model("llama", vocab_size=64, **{**sizes, "hidden_size": 64})
duorl.convert(AutoModelForCausalLM.from_config(tiny))  # what is imported and allocated once
open("/proc/self/clear_refs", "w").write("5")
before = memory("VmRSS")
size = sum(2 * weight.numel() for weight in duorl.convert(model).parameters())
print((memory("VmHWM") - before) / size)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read as Linux tells it")
def test_a_conversion_adds_one_copy_to_the_memory():
    found = subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, text=True)
    assert float(found.stdout) < 1.25, found.stderr


_FIRST = """
import sys
import duorl
assert "transformers" not in sys.modules
from transformers import AutoConfig, AutoModelForCausalLM
assert AutoModelForCausalLM._model_mapping[type(AutoConfig.for_model("duo"))] is duorl.DuoForCausalLM
duorl.load_tokenizer()
"""


def test_transformers_knows_duo_models_once_duorl_is_imported():
    """Also a tokenizer is read without a warning: its folder's configuration is a duo's."""
    found = subprocess.run([sys.executable, "-c", _FIRST], capture_output=True, text=True)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


_LIGHT = """
import sys
import duorl.corpus, duorl.costs, duorl.inputs, duorl.models.families, duorl.rewards, duorl.routed_pass
import duorl.learners.base, duorl.routers.base, duorl.routers.heads
from duorl.models import model_folder
model_folder("duo-tiny")
heavy = {"accelerate", "datasets", "matplotlib", "scipy", "sklearn", "transformers"}
sys.exit(f"imported: {heavy & set(sys.modules)}" if heavy & set(sys.modules) else 0)
"""


def test_the_parts_below_the_models_wait_with_transformers():
    found = subprocess.run([sys.executable, "-c", _LIGHT], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("family", [*FAMILIES, *LIKE_LLAMA])
def test_nothing_of_a_small_network_is_left_as_it_was_in_memory(family):
    """Apertus' activation has numbers of its own, which nothing draws."""
    torch.use_deterministic_algorithms(True)  # then torch fills new memory with nan
    try:
        duo = duorl.convert(make_original(family), small_ratio=4)
    finally:
        torch.use_deterministic_algorithms(False)
    for ffn in duo.stack.ffns:
        for name, tensor in [*ffn.small.named_parameters(), *ffn.small.named_buffers()]:
            assert tensor.isfinite().all(), name
