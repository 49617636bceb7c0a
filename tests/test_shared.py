"""Small networks are saved apart from their base model, and put together with it again."""

import json
import os
import shutil
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import COMMIT, FAMILIES, make_duo, make_original, random_routes
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    modeling_utils,
    pipeline,
)

import duorl
from duorl.models import DuoConfig, DuoForCausalLM, find_base, save_small, saving, shared
from duorl.models.bases import recorded_in
from duorl.models.shared import fingerprint
from duorl.routers import HeadRouter, PatternRouter, base


@pytest.fixture
def folders(tmp_path, duo):
    """A base model, and small networks for it."""
    make_original("llama").save_pretrained(tmp_path / "base")
    duorl.load_tokenizer().save_pretrained(tmp_path / "base")
    save_small(duo, tmp_path / "small", find_base(tmp_path / "base"))
    return tmp_path / "base", tmp_path / "small"


def test_small_networks_and_their_base_make_the_same_model(folders, duo, tokens):
    routes = random_routes(duo, tokens)
    expected = duo(input_ids=tokens[:, :-1], routes=routes).logits
    assert sorted(path.name for path in folders[1].iterdir()) == [
        "config.json",
        "generation_config.json",
        "small.safetensors",
    ]
    for model in (duorl.load(folders[1]), AutoModelForCausalLM.from_pretrained(folders[1])):
        assert torch.equal(model(input_ids=tokens[:, :-1], routes=routes).logits, expected)
        assert not model.training and model.config.base["fingerprint"] == fingerprint(duo)
    assert not any(weight.requires_grad for weight in duorl.load(folders[1]).parameters())
    assert duorl.load(folders[1], skip="block").config.skip == "block"
    assert duorl.load_tokenizer(folders[1]).get_vocab() == duorl.load_tokenizer().get_vocab()


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "falcon", "phi3", "opt", "bloom"])
def test_every_family_is_put_together(family, tmp_path, tokens):
    duo = make_duo(family)
    make_original(family).save_pretrained(tmp_path / "base")
    save_small(duo, tmp_path / "small", find_base(tmp_path / "base"))
    model, routes = duorl.load(tmp_path / "small"), random_routes(duo, tokens)
    given = {"input_ids": tokens[:, :-1], "routes": routes}
    assert torch.allclose(model(**given).logits, duo(**given).logits, atol=1e-5)


def test_a_router_fits_both_the_whole_model_and_the_small_networks(folders, tmp_path):
    small = duorl.load(folders[1])
    small.save_pretrained(tmp_path / "whole")
    duorl.load_tokenizer().save_pretrained(tmp_path / "whole")
    shutil.rmtree(folders[0])
    whole = duorl.load(tmp_path / "whole")
    assert whole.config.base is None and small.config.base is not None
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), small.parameters(), strict=True))
    router = duorl.routers.ConstantRouter("small")
    for trained, used in ((small, whole), (whole, small)):
        router.trained_for = duorl.routers.fit.identity(trained)
        router.require_fit(used)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_fingerprint_does_not_depend_on_the_precision(dtype, folders):
    model = duorl.load(folders[1], dtype=dtype)
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    assert {buffer.dtype for buffer in model.buffers()} <= {torch.float32}
    save_small(model, folders[1] / "again")
    assert duorl.load(folders[1] / "again").config.base == model.config.base
    if dtype == torch.float16:
        with pytest.raises(ValueError, match="float16 may have rounded the big networks"):
            save_small(model, folders[1], find_base(folders[0]))


def test_small_networks_keep_their_precision_and_base_when_they_are_saved_again(folders):
    model = duorl.load(folders[1])
    for ffn in model.stack.ffns:
        ffn.small.bfloat16()
    save_small(model, folders[1] / "again")
    weights = load_file(folders[1] / "again" / "small.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert duorl.load(folders[1] / "again").config.base == model.config.base
    model.stack.ffns[0].big.down_proj.weight.data[0] = 1.0
    with pytest.raises(ValueError, match=r"are not those of .*/base any more: save the whole model"):
        save_small(model, folders[1] / "third")
    model.config.base = None
    with pytest.raises(ValueError, match="saved with the name of their base model"):
        save_small(model, folders[1] / "third")
    assert not (folders[1] / "third").exists()


def test_a_base_in_a_folder_is_found_from_everywhere_and_its_path_starts_at_the_small_networks(
    duo, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    make_original("llama").save_pretrained("models/llama")
    save_small(duo, "made/small", find_base("models/llama"))
    written = json.loads(Path("made/small/config.json").read_text())
    assert (written["base"]["name"], written["backbone"]["_name_or_path"]) == ("../../models/llama",) * 2
    monkeypatch.chdir("/")
    model = duorl.load(tmp_path / "made" / "small")
    save_small(model, tmp_path / "small", find_base(tmp_path / "models" / "llama"))
    assert str(tmp_path) not in (tmp_path / "small" / "config.json").read_text()
    model.save_pretrained(tmp_path / "whole")
    assert str(tmp_path) not in (tmp_path / "whole" / "config.json").read_text()
    shutil.copytree(tmp_path / "made", tmp_path / "elsewhere" / "made")
    shutil.move(tmp_path / "models", tmp_path / "elsewhere")
    assert duorl.load(tmp_path / "elsewhere" / "made" / "small").config.base == {
        **model.config.base,
        "name": str(tmp_path / "elsewhere" / "models" / "llama"),
    }


def test_a_path_that_was_written_as_it_was_typed_is_found_where_it_was_typed(folders, monkeypatch):
    spoil_config(name="base")(*folders)
    shutil.move(folders[1], folders[1].parent / "deeper" / "small")
    monkeypatch.chdir(folders[0].parent)
    assert duorl.load("deeper/small").config.base["name"] == str(folders[0])


def test_a_path_is_kept_whole_if_only_the_root_is_shared(tmp_path):
    for name, kept in ((f"{tmp_path.parent}/llama", "../llama"), ("/nowhere/llama", "/nowhere/llama")):
        record = {"name": name, "revision": None}
        assert recorded_in(tmp_path, record) == {**record, "name": kept}
        assert recorded_in(tmp_path, record, shared=True) == {**record, "name": "llama"}
    elsewhere = {"name": "owner/llama", "revision": COMMIT}
    assert recorded_in(tmp_path, elsewhere) == recorded_in(tmp_path, elsewhere, shared=True) == elsewhere


def test_the_tokenizer_of_small_networks_is_the_bases_for_transformers_too(duo, tmp_path):
    original = AutoConfig.for_model("llama", **{**FAMILIES["llama"], "vocab_size": 2048})
    original.tokenizer_class = "GPT2Tokenizer"  # of older models; the folder of small networks has no files for it
    AutoModelForCausalLM.from_config(original).save_pretrained(tmp_path / "base")
    duorl.load_tokenizer().save_pretrained(tmp_path / "base")
    base = find_base(tmp_path / "base")
    model = duorl.convert(base.load(), small_ratio=4)
    save_small(model, tmp_path / "small", base)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "small", padding_side="left")
    assert tokenizer("def main(").input_ids == duorl.load_tokenizer()("def main(").input_ids
    assert tokenizer.padding_side == "left"
    write = pipeline("text-generation", str(tmp_path / "small"))
    written = write("def main(", max_new_tokens=4, do_sample=False, return_tensors=True)[0]["generated_token_ids"]
    ids = torch.tensor([tokenizer("def main(").input_ids])
    assert written == model.eval().generate(ids, max_new_tokens=4, do_sample=False)[0].tolist()
    tokenizer.save_pretrained(tmp_path / "small")  # then it has one of its own
    (tmp_path / "base" / "tokenizer.json").unlink()
    assert AutoTokenizer.from_pretrained(tmp_path / "small").get_vocab() == tokenizer.get_vocab()


def test_transformers_options_are_taken_for_small_networks_too(folders):
    model, info = AutoModelForCausalLM.from_pretrained(
        folders[1].parent, subfolder="small", device_map="cpu", dtype="bfloat16", output_loading_info=True
    )
    expected = AutoModelForCausalLM.from_pretrained(folders[0], output_loading_info=True)[1]
    assert info == expected and model.dtype == torch.bfloat16 and model.device == torch.device("cpu")
    with pytest.raises(ValueError, match="unexpected keyword argument 'nonsense'"):
        AutoModelForCausalLM.from_pretrained(folders[1], nonsense=3)
    model.save_pretrained(folders[1] / "whole")
    for folder in (folders[1], folders[1] / "whole"):
        with pytest.raises(ValueError, match="does not support Flash Attention 2"):
            AutoModelForCausalLM.from_pretrained(folder, attn_implementation="flash_attention_2")
        eager = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        assert eager.backbone.config._attn_implementation == "duorl"


def spoil_config(**changes):
    def spoil(base, small):
        path = small / "config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, "base": {**config["base"], **changes}}))

    return spoil


def spoil_weights(change):
    def spoil(base, small):
        weights = load_file(small / "small.safetensors")
        change(weights)
        save_file(weights, small / "small.safetensors", {"format": "pt"})

    return spoil


def finetune(base, small):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.model.layers[2].mlp.down_proj.weight.data *= 1.01
    model.save_pretrained(base)


NAME = "1.down_proj.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (finetune, "were made for other big networks than those of .*/base here: give that base model"),
        (lambda base, small: shutil.rmtree(base), "the base model of .*/small is missing: no base model '.*/base'"),
        (lambda base, small: (small / "small.safetensors").unlink(), "lacks small.safetensors"),
        (lambda base, small: (small / "small.safetensors").write_bytes(b""), "cannot read the weights in .*/small"),
        (spoil_config(name=3), r"config.json: `base` names no base model"),
        (
            spoil_config(name="nothing"),
            r"small is missing: no base model 'nothing': .*as base\.name",
        ),
        (spoil_config(fingerprint=None), "were made for other big networks"),
        (spoil_weights(lambda found: found.pop(NAME)), f"small.safetensors: {NAME} is missing"),
        (spoil_weights(lambda found: found.update(more=torch.zeros(1))), "small.safetensors holds more, which"),
        (spoil_weights(lambda found: found.update({NAME: torch.zeros(32, 17)})), r"has shape \(32, 17\) and not"),
        (spoil_weights(lambda found: found[NAME].fill_(torch.nan)), f"{NAME} holds numbers that are not finite"),
    ],
)
def test_what_does_not_belong_together_is_refused_in_one_line(spoil, message, folders):
    spoil(*folders)
    with pytest.raises((ValueError, OSError), match=message) as refused:
        duorl.load(folders[1])
    assert "\n" not in str(refused.value)


def test_both_are_found_on_the_hub(hub_cache, duo, tokens):
    base, small = hub_cache("someone/llama"), hub_cache("else/small")
    make_original("llama").save_pretrained(base)
    duorl.load_tokenizer().save_pretrained(base)
    save_small(duo, small, find_base("someone/llama"))
    recorded = json.loads((small / "config.json").read_text())
    assert (recorded["base"]["name"], recorded["base"]["revision"]) == ("someone/llama", COMMIT)
    assert recorded["backbone"]["_name_or_path"] == "someone/llama"
    expected = duo(input_ids=tokens).logits
    for model in (duorl.load("else/small"), AutoModelForCausalLM.from_pretrained("else/small", revision="main")):
        assert torch.equal(model(input_ids=tokens).logits, expected)
    assert duorl.load_tokenizer("else/small").eos_token_id is not None
    with pytest.raises(OSError, match="nobody/nothing is not in the hub's cache here"):
        duorl.load("nobody/nothing")


def test_options_of_the_hub_are_for_both_and_for_the_tokenizer(hub_cache, duo, tokens, tmp_path, monkeypatch):
    base, small = hub_cache("someone/llama"), hub_cache("else/small")
    make_original("llama").save_pretrained(base)
    duorl.load_tokenizer().save_pretrained(base)
    save_small(duo, small, find_base("someone/llama"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "nothing"))
    given = {"cache_dir": str(tmp_path / "hub"), "local_files_only": True, "token": "mine"}
    asked = []
    for name in ("hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, partial(recorded, asked, getattr(huggingface_hub, name)))
    for load in (AutoModelForCausalLM.from_pretrained, DuoForCausalLM.from_pretrained):
        model = load("else/small", **given, force_download=False)
        assert torch.equal(model(input_ids=tokens).logits, duo(input_ids=tokens).logits)
    assert AutoTokenizer.from_pretrained("else/small", **given).eos_token_id is not None
    assert len(asked) >= 6 and all(options.items() >= given.items() for options in asked)
    with pytest.raises(OSError, match="else/small"):
        duorl.load("else/small")  # the options end with the call


def recorded(asked, function, *args, **options):
    asked.append(options)
    return function(*args, **options)


def everything(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def save_with_tokenizer(model, folder):
    saving.save(model, duorl.load_tokenizer(), folder)


@pytest.mark.parametrize("before", ["small", "whole"])
@pytest.mark.parametrize("after", [save_small, DuoForCausalLM.save_pretrained, save_with_tokenizer])
def test_a_save_that_fails_at_any_step_leaves_what_was_there(folders, tmp_path, monkeypatch, before, after):
    """Over a good folder, as on a full disk: every file that is written or renamed fails in turn."""
    place, old, steps = tmp_path / "base" / "place", duorl.load(folders[1]), []
    first, view = (old.with_router(router) for router in (PatternRouter([2, 1, 0]), HeadRouter(3, 32)))
    first.save_pretrained(place, max_shard_size="30KB") if before == "whole" else save_small(first, place)
    known, fails_at = everything(place), 0

    def failing(kind, name):
        own = getattr(kind, name)

        def step(*args, **kwargs):
            steps.append(name)
            if len(steps) == fails_at:
                raise OSError(28, "No space left on device")
            return own(*args, **kwargs)

        monkeypatch.setattr(kind, name, step)

    for kind, name in ((shared, "save_file"), (base, "save_file"), (modeling_utils, "safe_save_file"), (os, "replace")):
        failing(kind, name)
    for kind in (GenerationConfig, DuoConfig, PreTrainedTokenizerBase):
        failing(kind, "save_pretrained")
    while True:
        fails_at, steps[:] = fails_at + 1, []
        try:
            after(view, place)
            break
        except OSError:
            assert everything(place) == known, f"{steps[-1]}, step {fails_at}"
    assert fails_at > 10 and everything(place) != known
    assert not list(place.rglob(".part-*")) and not list(place.glob("model-*-of-*"))
    assert (place / "small.safetensors").exists() == (after is save_small) != (place / "model.safetensors").exists()


def test_processes_that_do_not_write_leave_the_folder(duo, tmp_path):
    duo.with_router(PatternRouter([2, 1, 0])).save_pretrained(tmp_path)
    known = everything(tmp_path)
    duo.with_router(PatternRouter([2, 2, 2])).save_pretrained(tmp_path, is_main_process=False)
    assert everything(tmp_path) == known


def test_a_save_leaves_the_configuration_to_other_threads(folders, tmp_path, monkeypatch):
    model = duorl.load(folders[1])
    config, before, seen = model.config, model.config.to_dict(), []
    own = DuoConfig.save_pretrained
    looking = lambda self, *args, **kwargs: (seen.append(config.to_dict()), own(self, *args, **kwargs))  # noqa: E731
    monkeypatch.setattr(DuoConfig, "save_pretrained", looking)
    model.save_pretrained(tmp_path / "whole")
    assert seen == [before] and model.config is config and config.base is not None
    assert json.loads((tmp_path / "whole" / "config.json").read_text()).get("base") is None


def test_a_view_is_saved_with_its_router_and_comes_back(folders, tmp_path, tokens):
    small, x = duorl.load(folders[1]), tokens[:, :-1]
    view = small.with_router(PatternRouter([2, 1, 0]))
    expected, plain = view(input_ids=x).logits, small(input_ids=x).logits
    assert not torch.equal(expected, plain)
    saves = {"whole": lambda model, folder: model.save_pretrained(folder), "small": save_small}
    for name, save in saves.items():
        folder = tmp_path / name
        save(view, folder)
        duorl.load_tokenizer().save_pretrained(folder)
        for load in (duorl.load, DuoForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained):
            assert torch.allclose(load(folder)(input_ids=x).logits, expected, atol=1e-5), name
        save(small, folder)  # without a router: it does not come back
        assert torch.allclose(duorl.load(folder)(input_ids=x).logits, plain, atol=1e-5)
    with pytest.raises(ValueError, match=r"cannot be saved with the model: make it a duorl.routers.Router"):
        small.with_router(lambda hidden, layer, compute: hidden[..., 0] > 0).save_pretrained(tmp_path / "whole")
