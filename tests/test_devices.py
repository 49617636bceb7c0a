"""Where a model runs: names of devices, precision, threads, memory, and what an accelerator must not wait for."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_duo
from torch.nn.functional import one_hot
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig

import duorl
from duorl import agents, devices, envs, routed_pass
from duorl.cli import COMMANDS
from duorl.cli.parser import parse
from duorl.devices import free_bytes, pick_device, pick_dtype, processes_for, require_memory, threads_for
from duorl.models import ffn
from duorl.models.config import DuoConfig
from duorl.models.ffn import DuoFFN, group_sizes
from duorl.models.footprint import Batch, Keeps, peak_bytes, weight_bytes
from duorl.models.loading import EMBEDDED
from duorl.routed_pass import RoutedPass
from duorl.runs.folders import CONFIG, check_same_options
from duorl.smalls.recipe import STAGES

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def with_cuda(monkeypatch, count, bfloat16=True):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bfloat16)


def test_auto_takes_an_accelerator_if_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with_cuda(monkeypatch, 0)
    assert pick_device("auto") == pick_device("cpu") == CPU
    with_cuda(monkeypatch, 2)
    assert pick_device("auto") == torch.device("cuda") and pick_device("cuda:1") == torch.device("cuda:1")
    with_cuda(monkeypatch, 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto") == torch.device("mps")


@pytest.mark.parametrize("name", ["gpu", "", "cpu:0", "mps:1", "cuda:", "cuda:-1", "cuda:x", "CUDA", "auto:0"])
def test_an_unknown_device_is_refused(name):
    with pytest.raises(ValueError, match="device must be auto, cpu, cuda, cuda:N or mps, not"):
        pick_device(name)


def test_a_device_that_is_not_there_is_refused_with_those_that_are(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with_cuda(monkeypatch, 1)
    with pytest.raises(ValueError, match="device cuda:1 is not there: this machine has cpu, cuda:0"):
        pick_device("cuda:1")


def test_auto_is_bfloat16_where_the_device_computes_in_it_and_the_model_is_wide(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True, "amx_bf16": False}, raising=False)
    assert pick_dtype("auto", CPU, 576) == torch.bfloat16
    assert pick_dtype("auto", CPU, 192) == torch.float32  # duo-tiny: the numbers in the docs
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False, "avx2": True}, raising=False)
    assert pick_dtype("auto", CPU, 4096) == torch.float32 and pick_dtype("float16", CPU, 8) == torch.float16
    with_cuda(monkeypatch, 1, bfloat16=False)
    assert pick_dtype("auto", torch.device("cuda"), 4096) == torch.float32


def test_processes_share_the_threads_that_are_not_given(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(devices.os, "cpu_count", lambda: 8)
    assert [threads_for(n, None) for n in (1, 3, 16)] == [8, 2, 1] and threads_for(3, 4) == 4
    assert processes_for(CPU, None) == 8 and processes_for(CPU, 4) == 2 and processes_for(CPU, 16) == 1
    assert processes_for(torch.device("cuda"), None) == 1


def test_what_does_not_fit_is_refused_with_the_numbers(monkeypatch, tokens):
    assert 0 < free_bytes(CPU) < 2**50
    monkeypatch.setattr(devices, "free_bytes", lambda device: 3 * 2**30)
    require_memory(3 * 2**30, CPU, "they", "buy more")
    said = "they do not fit into memory: they take about 4.5 GiB, and cpu has 3.0 GiB free; buy more"
    with pytest.raises(ValueError, match=said):
        require_memory(4.5 * 2**30, CPU, "they", "buy more")
    monkeypatch.setattr(devices, "free_bytes", lambda device: 700 * 2**20)
    with pytest.raises(ValueError, match=r"about 1\.0 GiB, and cpu has 700\.0 MiB free"):
        require_memory(2**30, CPU, "they", "buy more")
    monkeypatch.setattr(devices, "free_bytes", lambda device: 2**18)
    with pytest.raises(ValueError, match=r"the weights in .* do not fit into memory"):
        duorl.load("duo-tiny")
    duo = make_duo("llama").requires_grad_(False)
    lockstep = envs.Lockstep(duo, tokens, windows_per_batch=2, group_size=2)
    with pytest.raises(ValueError, match=r"28 tokens at once .* lower group_size \(2\) or windows_per_batch"):
        agents.ReinMax(lockstep)


MIB = 2**20
GROUPS = {
    "none": ({}, None),
    "limits without a number": ({"memory.max": "max", "memory.high": "max", "memory.current": 5 * MIB}, None),
    "a full container": ({"memory.max": 10 * MIB, "memory.current": 8 * MIB, "memory.stat": "anon 5"}, 2 * MIB),
    "cached files": (
        {"memory.max": 10 * MIB, "memory.current": 8 * MIB, "memory.stat": f"file {7 * MIB}\ninactive_file {MIB}"},
        3 * MIB,
    ),
    "high below max": ({"memory.max": 10 * MIB, "memory.high": 9 * MIB, "memory.current": 8 * MIB}, MIB),
    "high alone": ({"memory.max": "max", "memory.high": 9 * MIB, "memory.current": 8 * MIB}, MIB),
    "above high": ({"memory.max": 10 * MIB, "memory.high": 7 * MIB, "memory.current": 8 * MIB}, 0),
    "a job in a wide group": (
        {
            "memory.max": 10 * MIB,
            "memory.current": 2 * MIB,
            "jobs/one/memory.max": 4 * MIB,
            "jobs/one/memory.current": MIB,
        },
        3 * MIB,
    ),
    "a job in a narrow group": (
        {"jobs/memory.max": 4 * MIB, "jobs/memory.current": 3 * MIB, "jobs/one/memory.max": 9 * MIB},
        MIB,
    ),
    "version 1": (
        {
            "memory/memory.limit_in_bytes": 10 * MIB,
            "memory/memory.usage_in_bytes": 8 * MIB,
            "memory/memory.stat": f"inactive_file 7\ntotal_inactive_file {MIB}",
        },
        3 * MIB,
    ),
    "version 1 without a limit": (
        {"memory/memory.limit_in_bytes": 2**63 - 4096, "memory/memory.usage_in_bytes": 8 * MIB},
        None,
    ),
    "a job of version 1": (
        {"memory/jobs/two/memory.limit_in_bytes": 10 * MIB, "memory/jobs/two/memory.usage_in_bytes": 3 * MIB},
        7 * MIB,
    ),
}


@pytest.mark.parametrize("name", GROUPS)
def test_a_container_gives_what_is_left_of_its_limit(name, monkeypatch, tmp_path):
    files, left = GROUPS[name]
    monkeypatch.setattr(devices, "_GROUPS", tmp_path)
    monkeypatch.setattr(devices, "_OWN_GROUP", tmp_path / "cgroup")
    monkeypatch.setattr(devices, "_available", lambda: 2**40)
    (tmp_path / "cgroup").write_text("9:pids:/\n4:cpu,memory:/jobs/two\n0::/jobs/one\n")
    for path, content in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"{content}\n")
    assert free_bytes(CPU) == (2**40 if left is None else left)
    monkeypatch.setattr(devices, "_available", lambda: 1000)
    assert free_bytes(CPU) == min(1000, 1000 if left is None else left)


def test_a_run_keeps_its_device_and_precision_and_may_change_its_threads(tmp_path):
    _, text = parse("train", ["--threads", "3"])
    kept = yaml.safe_load(text)
    assert (kept["device"], kept["dtype"], kept["threads"]) == (str(pick_device()), "float32", 3)
    (tmp_path / CONFIG).write_text(text)
    check_same_options(str(tmp_path), parse("train", ["--device", str(pick_device())])[1])
    with pytest.raises(ValueError, match="was made with dtype float32, not bfloat16"):
        check_same_options(str(tmp_path), parse("train", ["--dtype", "bfloat16"])[1])


def test_a_run_is_not_resumed_in_another_precision_on_another_processor(tmp_path, monkeypatch):
    AutoConfig.for_model("llama", hidden_size=512).save_pretrained(tmp_path / "wide")
    (tmp_path / "wide" / "model.safetensors").touch()
    runs = {"train": "smollm2", "convert": str(tmp_path / "wide")}

    def text(command):
        return parse(command, ["--model", runs[command], "--out", "run", "--device", "cpu"])[1]

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    for command in runs:
        (tmp_path / command).mkdir()
        (tmp_path / command / CONFIG).write_text(text(command))
        check_same_options(str(tmp_path / command), text(command))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False}, raising=False)
    for command in runs:
        with pytest.raises(ValueError, match="was made with dtype bfloat16, not float32: cannot resume it"):
            check_same_options(str(tmp_path / command), text(command))
    assert yaml.safe_load(parse("convert", ["--model", "nowhere", "--out", "run"])[1])["dtype"] == "auto"


def test_a_model_is_loaded_in_a_precision_by_its_name():
    assert duorl.load("duo-tiny", dtype="bfloat16", device="cpu").dtype == torch.bfloat16
    assert duorl.load("duo-tiny", dtype="auto", device="auto").dtype == torch.float32


def test_weights_and_activations_are_what_is_stated():
    model = duorl.load("duo-tiny")
    own = sum(weight.numel() * weight.itemsize for weight in model.parameters())
    assert weight_bytes(model.config, torch.float32) == pytest.approx(own, rel=0.01)
    one, two = (peak_bytes(model.config, Batch(n, 100, "states"), torch.float32) for n in (100, 200))
    held = 8 * 192 * 4  # the states of all layers, which heads learn from
    assert 10_000 * held < two - one < 10_000 * 8 * held
    everything = peak_bytes(model.config, Batch(100, 100, "everything"), torch.float32)
    assert everything > one > peak_bytes(model.config, Batch(100, 100), torch.bfloat16)


_SHAPES = {  # layers, hidden, inner, heads, key-value heads, vocabulary, tied
    "SmolLM2-135M": (30, 576, 1536, 9, 3, 49152, True),
    "1 B": (16, 2048, 8192, 32, 8, 128256, True),
    "8 B": (32, 4096, 14336, 32, 8, 128256, False),
}


def config_of(name):
    keys = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    backbone = dict(zip((*keys, "vocab_size", "tie_word_embeddings"), _SHAPES[name], strict=True))
    return DuoConfig({"model_type": "llama", **backbone}, small_size=backbone["intermediate_size"] // 16)


@pytest.mark.parametrize("name", _SHAPES)
def test_the_page_states_what_is_computed(name):
    config = config_of(name)

    def peak(tokens, keeps):
        return peak_bytes(config, Batch(1, tokens, keeps), torch.bfloat16)

    weights = f"{weight_bytes(config, torch.bfloat16) / 1e9:.2f} GB"
    head = f"{(2 * peak(512, 'nothing') - peak(1024, 'nothing')) / 1e9:.2f} GB"
    keeps: tuple[Keeps, ...] = ("nothing", "states", "everything")
    each = [f"{(peak(1512, kept) - peak(512, kept)) / 1e6:,.0f} kB" for kept in keeps]
    assert (
        " | ".join([f"| {name}", weights, head, *each])
        in (ROOT / "docs" / "explanation" / "performance.md").read_text()
    )


def spent_per_token(layers, width, inner, heads, keys, vocabulary, tied):
    """The formula of the page: weights times uses per token in the three stages; and the weights of small networks."""
    attention = 2 * layers * width * (width + width // heads * keys)
    big, small = (3 * layers * width * size for size in (inner, inner // 16))
    with_big, with_small, head = attention + big, attention + small, vocabulary * width
    distil = with_big + head + 3 * (with_big + with_small + 2 * head) / 2
    return (2 * with_big, with_big + 3 * with_small, distil), small


@pytest.mark.parametrize("name", _SHAPES)
def test_the_tutorial_states_what_is_computed_and_extrapolated(name):
    page, card = (
        (ROOT / "docs" / "explanation" / "small-networks.md").read_text(),
        (EMBEDDED["smollm2"] / "README.md").read_text(),
    )
    measured = [float(re.search(rf"\| {stage} \| [\d,]+ \| ([\d.]+) \|", card)[1]) for stage in STAGES]
    spent, small = spent_per_token(*_SHAPES[name])
    ratios = [own / one for own, one in zip(spent, spent_per_token(*_SHAPES["SmolLM2-135M"])[0], strict=True)]
    choose, regress, distil = (minutes * ratio for minutes, ratio in zip(measured, ratios, strict=True))
    config = config_of(name)
    whole = 2 * weight_bytes(config, torch.float32) / 1e9
    peak = peak_bytes(config, Batch(1, 512, "everything"), torch.bfloat16)
    training = (weight_bytes(config, torch.bfloat16) + peak + 16 * small) / 1e9
    hours = f"{distil / 60:.1f} h | {distil * 200_000 / 1_228_800 / 60:.1f} h"
    minutes = f"{choose:.0f} min | {regress:.{1 if regress < 10 else 0}f} min"
    assert f"| {name} | {minutes} | {hours} | {whole:.1f} GB | {training:.1f} GB |" in page
    if name == "8 B":
        assert f"for an 8 B model {whole:.1f} GB" in (ROOT / "docs" / "explanation" / "small-networks.md").read_text()


def test_the_page_names_the_commands_with_a_device():
    page = (ROOT / "docs" / "how-to" / "devices.md").read_text()
    routed, trained = page.split(" have three options")[0], page.split(" train whole models")[0]
    for text, flags in ((routed, {"device", "map"}), (trained, {"trainer"})):
        named = set(re.findall(r"`(\w+)`", text.split("\n\n")[-1]))
        assert named == {name for name, command in COMMANDS.items() if flags & set(command.flags)}


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for an accelerator."""

    waits = ("_local_scalar_dense", "nonzero", "bincount", "unique", "is_nonzero", "equal")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.partition(".")[0]
        assert name not in self.waits and not name.startswith("unique"), f"{name} waits"
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("differentiable", [False, True])
def test_small_groups_are_never_waited_for_beside_a_processor(differentiable, tokens, monkeypatch):
    duo = make_duo("llama").requires_grad_(False)
    actions = torch.randint(1 if differentiable else 0, 3, (3, *tokens[:, 1:].shape))
    grouped = walked(duo, tokens, actions, differentiable, nullcontext())
    monkeypatch.setattr(DuoFFN, "cheaper_than_waiting", lambda ffn, tokens: True)
    selected = walked(duo, tokens, actions, differentiable, NoWaiting())
    for one, other in zip(grouped, selected, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def walked(duo, tokens, actions, differentiable, watch):
    """Losses along routes, and their derivatives by the choices; all layers run under a watch.

    The begin and the end of a pass are not watched: there transformers makes masks, for which it waits.
    """
    walk = RoutedPass(duo, tokens)
    choices = [one_hot(taken - 1, 2).float().requires_grad_() for taken in actions] if differentiable else []
    with watch:
        while not walk.done:
            if choices:
                walk.mix(choices[walk.layer], (1, 2), hard=True)
            else:
                walk.step(actions[walk.layer])
    losses = walk.losses()
    return [losses.detach(), *(torch.autograd.grad(losses.sum(), choices) if choices else ())]


def test_known_routes_are_counted_once_and_a_routers_in_every_layer(tokens, monkeypatch):
    duo = make_duo("llama").requires_grad_(False)
    routes, counted = torch.randint(3, (*tokens[:, 1:].shape, 3)), []
    monkeypatch.setattr(ffn, "_FEW", 0)
    for module in (ffn, routed_pass):
        monkeypatch.setattr(module, "group_sizes", lambda codes: counted.append(codes.shape) or group_sizes(codes))
    known = RoutedPass(duo, tokens).follow(routes)
    assert counted == [(3, routes[..., 0].numel())]
    steered = RoutedPass(duo, tokens)
    while not steered.done:
        steered.step(routes[..., steered.layer])
    assert len(counted) == 4 and torch.equal(known.losses(), steered.losses())


def test_large_groups_are_waited_for():
    networks = make_duo("llama").stack.ffns[0]
    for count, cheap in ((1, True), (10**9, False)):
        assert networks.cheaper_than_waiting(torch.empty(count, 32, device="meta")) == cheap
    assert not networks.cheaper_than_waiting(torch.empty(1, 32))
