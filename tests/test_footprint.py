"""The memory that a pass takes, against what the check before it says: peaks of a process's resident memory."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, ROUTED_ONLY, VARIANTS
from jsonargparse import Namespace
from transformers import AutoConfig, AutoModelForCausalLM

import duorl
from duorl import agents, envs, learners
from duorl.cli import generate
from duorl.models.footprint import Batch, Keeps, peak_bytes
from duorl.routed_pass import RoutedPass
from duorl.routers import ConstantRouter

MIB = 2**20
LENGTH = 4096
TRAINED = 2100  # tokens of a window in a training
_KNOWN = {**FAMILIES, **ROUTED_ONLY, **VARIANTS}
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
_SIZES = {"max_position_embeddings": 8192, "n_positions": 8192}
_SIZES |= {"num_attention_heads": 2, "n_head": 2, "num_heads": 2, "num_key_value_heads": 1}
_OWN: dict[str, dict[str, Any]] = {
    "helium": {"head_dim": 16},
    "diffllama": {"num_key_value_heads": 2},
    "gemma2": {"num_hidden_layers": 2},  # one with a mask, one without
    "gpt_neo": {"num_layers": 2, "max_position_embeddings": 4096},
    "olmo_hybrid": {"num_hidden_layers": 2},
    "qwen3_5_text": {
        "num_hidden_layers": 4,
        "layer_types": [*["linear_attention"] * 3, "full_attention"],
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
    },
}
# A kernel, a mask, softcapping, own products, one key for all heads, scores in float32, linear attention.
_TRAINED = ["llama", "mistral", "gemma2", "bloom", "falcon", "gpt_neo", "qwen3_5_text"]
_READERS = [*FAMILIES, "falcon 1B, alibi", "falcon 40B"]
CASES = [
    *((family, "routed", "nothing", "float32") for family in [*_READERS, *ROUTED_ONLY]),
    *((family, "reference", "nothing", "float32") for family in _READERS),
    *((family, "routed", "everything", "float32") for family in _TRAINED),
    *((family, "reference", "everything", "float32") for family in ("llama", "bloom")),
    *((family, "routed", "nothing", "bfloat16") for family in ("gemma2", "bloom")),
    *((family, "routed", "everything", "bfloat16") for family in ("bloom", "gpt_neo")),
]


def sized(family: str, dtype: torch.dtype, layers: int):
    """A duo model of 2 heads and 8,192 positions."""
    known = _KNOWN[family]
    sizes = {name: value for name, value in {**_SIZES, **dict.fromkeys(_LAYERS, layers)}.items() if name in known}
    config = AutoConfig.for_model(family.split()[0].strip(","), **{**known, **sizes, **_OWN.get(family, {})})
    model = duorl.convert(AutoModelForCausalLM.from_config(config).eval(), small_ratio=4)
    return model.to(dtype).eval().requires_grad_(False)


def steered(model, tokens, context) -> Callable[[], None]:
    """A pass without derivatives."""

    @torch.no_grad()
    def work() -> None:
        walk = RoutedPass(model, tokens, context=context)
        walk.steer(ConstantRouter("small").decide)
        walk.losses()

    return work


def learned(model, tokens, context) -> Callable[[], None]:
    """An update of a learner that keeps all of its pass."""
    env = envs.Lockstep(model, tokens, windows_per_batch=1, context=context)
    learner = learners.Soft(env) if context == "routed" else agents.ReinMax(env)
    learner.planned = 10**6

    def work() -> None:
        learner.update()

    return work


def most_resident() -> int:
    """Bytes of memory that this process has at most had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def measured(case: tuple[str, Any, Keeps, str]) -> tuple[int, int]:
    """Bytes by which a process grows at its peak in a case, and what they are said to be."""
    family, context, keeps, precision = case
    dtype = getattr(torch, precision)
    learns = keeps == "everything"
    model, make = sized(family, dtype, 2 if learns else 1), learned if learns else steered
    length = TRAINED if learns else LENGTH
    tokens = torch.randint(61, (1, length + 1))
    make(model, tokens[:, :17], context)()  # kernels are loaded
    work = make(model, tokens, context)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of making the model is forgotten
    before = most_resident()
    work()
    return most_resident() - before, peak_bytes(model.config, Batch(1, length, keeps, context), dtype)


def measured_alone(case: tuple[str, Any, Keeps, str]) -> tuple[int, int]:
    """The same in a copy of this process: what other cases leave in the heap would change it."""
    torch.set_num_threads(1)
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            os.write(writer, json.dumps(measured(case)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as found:
        grown, said = json.load(found)
    os.wait()
    return grown, said


@pytest.fixture(scope="module")
def apart():
    """A process with one thread and nothing but the packages."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the system does not tell peaks of memory")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        yield lambda case: pool.apply(measured_alone, (case,))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_no_pass_takes_more_than_is_said(case, apart):
    grown, said = apart(case)
    assert grown <= said, f"{grown / MIB:.0f} MiB, and {said / MIB:.0f} said"
    assert said <= 3 * max(grown, 100 * MIB), f"{grown / MIB:.0f} MiB, and {said / MIB:.0f} said"


def test_a_prompt_that_does_not_fit_is_refused(monkeypatch):
    model, options = sized("gemma2", torch.float32, 2), Namespace(max_new_tokens=8, draft=None, html=None)
    monkeypatch.setattr("duorl.devices.free_bytes", lambda device: 64 * MIB)
    generate._require_room(model, 64, options)
    with pytest.raises(
        ValueError, match=r"4,096 tokens at once do not .*; shorten the prompt, or lower max_new_tokens"
    ):
        generate._require_room(model, 4096, options)


@pytest.mark.parametrize(
    ("make", "fix"),
    [
        (lambda options: envs.DuoRoutingEnv(**options), "lower window"),
        (lambda options: envs.DuoRoutingVectorEnv(num_envs=9, tokens_per_window=9, **options), r"lower num_envs \(9\)"),
        (lambda options: envs.DuoRoutingVectorEnv(num_envs=2, **options), r"lower num_envs \(2\)"),
    ],
)
def test_environments_that_do_not_fit_are_refused(make, fix, duo, monkeypatch):
    options = {"model": duo, "windows": torch.randint(61, (4, 10), generator=torch.Generator().manual_seed(0))}
    make(options)
    monkeypatch.setattr("duorl.devices.free_bytes", lambda device: 1000)
    with pytest.raises(ValueError, match=f"do not fit into memory: .*{fix}"):
        make(options)
