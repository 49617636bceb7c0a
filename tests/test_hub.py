"""Models and routers are sent to the hub with their cards, and loaded from it; a fake stands in for the hub."""

import json
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from conftest import make_original
from transformers import AutoModelForCausalLM

import duorl
from duorl import routers
from duorl.models import DuoForCausalLM, find_base, save_small
from duorl.models.card import write_small_card


@pytest.fixture
def sent(hub_cache, monkeypatch):
    """What is sent is put into the hub's cache; gives a list of the calls."""
    calls = []

    class Api:
        def __init__(self, token=None):
            self.token = token

        def create_repo(self, name, *, private, exist_ok):
            calls.append({"token": self.token, "private": private})
            return SimpleNamespace(repo_id=name)

        def upload_folder(self, *, repo_id, folder_path, **more):
            shutil.copytree(folder_path, hub_cache(repo_id), dirs_exist_ok=True)
            calls[-1] |= more
            return SimpleNamespace(commit_url=f"https://hub/{repo_id}")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return calls


def test_a_router_is_sent_with_its_card_and_loaded_again(sent, duo, tmp_path):
    router = routers.HeadRouter(3, 32, seed=1)
    router.trained_for = routers.fit.identity(duo)
    router.save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()
    routers.describe(tmp_path, {"name": "PPO", "corpus": ["stdlib-code", "stdlib-docs"], "decisions": 24000})
    routers.describe(tmp_path, {"price": 0.3, "measured": [{"router": "PPO", "loss": 3.51234, "compute": 0.5}]})
    card = (tmp_path / "README.md").read_text()
    for line in (
        "# PPO",
        "| corpus | stdlib-code, stdlib-docs |",
        "| decisions | 24,000 |",
        "| price | 0.3 |",
        "measured:\n\n| router | loss | compute |\n| --- | --- | --- |\n| PPO | 3.512 | 0.5 |",
    ):
        assert line in card
    address = routers.load(tmp_path).push_to_hub("me/router", private=True, token="mine", revision="main")
    assert address == "https://hub/me/router"
    assert sent == [{"token": "mine", "private": True, "commit_message": "Upload router", "revision": "main"}]
    found = routers.load("me/router")
    assert all(torch.equal(one, other) for one, other in zip(found.parameters(), router.parameters(), strict=True))
    assert found.trained_for == router.trained_for and found.facts["price"] == 0.3
    found.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text() == card


def test_a_model_is_sent_as_it_came_with_its_card(sent, duo, tmp_path, tokens, monkeypatch):
    make_original("llama").save_pretrained(tmp_path / "base")
    duorl.load_tokenizer().save_pretrained(tmp_path / "base")
    save_small(duo, tmp_path / "small", find_base(tmp_path / "base"))
    facts = {"name": "small", "base": "someone/llama", "command": "duorl convert", "layers": 3}
    facts["stages"] = [{"stage": "choose", "tokens": 20000}, {"stage": "distil", "tokens": 102400}]
    losses = {"stdlib-docs": {"tokens": 4096, "all-big": 3.19, "all-small": 4.64}}
    write_small_card(tmp_path / "small", facts=facts, losses=losses, header={"license": "mit"})
    card = (tmp_path / "small" / "README.md").read_text()
    assert "license: mit\n---\n" in card and "| distil | 102,400 |" in card and "| layers | 3 |" in card
    assert "| text | tokens | all-big | all-small |\n| --- | --- | --- | --- |\n| stdlib-docs | 4,096 | 3.19 |" in card
    model = duorl.load(tmp_path / "small")
    assert model.push_to_hub("me/small") == "https://hub/me/small"
    with pytest.raises(OSError, match=r"no base model 'base': .* or write into .*config.json, as base.name, where it"):
        duorl.load("me/small")  # no path of this machine is told
    monkeypatch.chdir(tmp_path)
    found = duorl.load("me/small")
    assert torch.equal(found(input_ids=tokens).logits, duo(input_ids=tokens).logits)
    duo.push_to_hub("me/whole")
    with pytest.raises(FileNotFoundError, match=r"lacks tokenizer\.json"):
        duorl.load("me/whole")
    assert [call["commit_message"] for call in sent] == ["Upload model"] * 2


@pytest.mark.parametrize("form", ["small", "whole"])
def test_a_view_is_sent_with_its_router_and_comes_back(form, sent, duo, tmp_path, tokens, hub_cache):
    model = duo
    if form == "small":
        make_original("llama").save_pretrained(hub_cache("me/base"))
        save_small(duo, tmp_path, find_base("me/base"))
        model = DuoForCausalLM.from_pretrained(tmp_path)
    view = model.with_router(routers.HeadRouter(3, 32, seed=1))
    expected = view(input_ids=tokens).logits
    assert not torch.equal(expected, model(input_ids=tokens).logits)
    view.push_to_hub("me/pushed")
    view.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="me/saved", commit_message="Mine")
    assert [call["commit_message"] for call in sent] == ["Upload model", "Mine"]
    for name in ("me/pushed", "me/saved"):
        for kind in (AutoModelForCausalLM, DuoForCausalLM):
            assert torch.equal(kind.from_pretrained(name).eval()(input_ids=tokens).logits, expected)


def test_what_the_hub_refuses_is_told_in_one_line(hub_cache, tmp_path):
    with pytest.raises(OSError, match=r"me/router on the hub: .*offline") as refused:
        routers.ConstantRouter("small").push_to_hub("me/router")
    assert "\n" not in str(refused.value)
    with pytest.raises(OSError, match="nobody/router is not in the hub's cache here"):
        routers.load("nobody/router")
    routers.ConstantRouter("small").save_pretrained(tmp_path)
    described = json.loads((tmp_path / "router.json").read_text())
    (tmp_path / "router.json").write_text(json.dumps({**described, "facts": 3}))
    with pytest.raises(ValueError, match="its `facts` are no JSON object"):
        routers.load(tmp_path)
