"""A model of which a part stays on the disk computes what the whole one computes, and takes less memory."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import duorl
from duorl.agents import REINFORCE
from duorl.cli import main
from duorl.envs import Lockstep
from duorl.rewards import LossImprovement
from duorl.routed_pass import RoutedPass
from duorl.routers import PatternRouter
from duorl.routers.fit import identity

PARTS = {name: "cpu" for name in ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")}
MAP = {f"backbone.{name}": place for name, place in PARTS.items()}
MAP |= {f"backbone.model.layers.{layer}": "cpu" if layer < 3 else "disk" for layer in range(8)}


@pytest.fixture(scope="module")
def both():
    return duorl.load(), duorl.load(device_map=MAP)


def test_what_is_on_the_disk_is_read_when_it_runs(both):
    whole, spread = both
    assert {weight.is_meta for weight in spread.stack.ffns[3].parameters()} == {True}
    assert identity(spread) == identity(whole)
    tokens = torch.randint(100, (2, 17), generator=torch.Generator().manual_seed(0))
    routes = torch.randint(3, (2, 16, 8), generator=torch.Generator().manual_seed(1))
    for context in ("routed", "reference"):
        one, other = (RoutedPass(model, tokens, context=context).follow(routes).losses() for model in both)
        assert torch.equal(one, other)
    router = PatternRouter([2, 1, 1, 2, 1, 2, 1, 1])
    options = {"router": router, "max_new_tokens": 8, "attention_mask": torch.ones_like(tokens[:1])}
    assert torch.equal(*(model.generate(tokens[:1], **options) for model in both))


def test_a_router_is_trained_on_it(both):
    windows = torch.randint(100, (4, 9), generator=torch.Generator().manual_seed(2))
    learned = []
    for model in both:
        env = Lockstep(model, windows, reward=LossImprovement(0.1), windows_per_batch=2, group_size=2)
        learned.append(REINFORCE(env).learn(2000).state_dict())
    assert all(torch.equal(learned[0][name], learned[1][name]) for name in learned[0])


PEAK = """
import json, re, sys
import torch, duorl
from duorl.routed_pass import RoutedPass
import transformers.models.llama.modeling_llama, accelerate
duorl.load()
torch.set_num_threads(1)
def mebibytes(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
open("/proc/self/clear_refs", "w").write("5")  # the peak from here on
before = mebibytes("VmRSS")
model = duorl.load("big", **json.loads(sys.argv[1]))
losses = RoutedPass(model, torch.arange(34).view(2, 17)).take_all(2).losses()
print(json.dumps([losses.sum().item(), mebibytes("VmHWM") - before]))
"""


@pytest.mark.slow
def test_it_takes_no_more_memory_than_it_may(tmp_path):
    sizes = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 12, "num_attention_heads": 4}
    config = AutoConfig.for_model("llama", vocab_size=100, **sizes)
    duorl.convert(AutoModelForCausalLM.from_config(config)).save_pretrained(tmp_path / "big")
    duorl.load_tokenizer().save_pretrained(tmp_path / "big")
    found = {}
    for name, options in {"whole": {}, "spread": {"device_map": "auto", "max_memory": {"cpu": "100MB"}}}.items():
        command = [sys.executable, "-c", PEAK, json.dumps(options)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found[name] = json.loads(done.stdout.splitlines()[-1])
    assert found["whole"][0] == pytest.approx(found["spread"][0], abs=1e-4)
    assert found["whole"][1] > 300 and found["spread"][1] < 200, found  # MiB; a layer has 29


def test_a_map_needs_all_weights_and_reaches_the_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    few = ["--windows", "1", "--window", "8", "--corpus", "stdlib-docs"]
    main(["oracle", *few, "--device_map", "auto", "--max_memory", '{"cpu": "8MB"}', "--out", "spread"])
    main(["oracle", *few, "--out", "whole"])
    rows = [json.loads((tmp_path / run / "oracle.json").read_text())["rows"] for run in ("spread", "whole")]
    assert rows[0] == rows[1]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["oracle", *few, "--device_map", "nowhere", "--out", "other"])
    assert stop.value.code == 2 and "device_map" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"device_map needs all weights: convert with --whole"):
        duorl.load("smollm2", device_map="auto")
