"""The memory that a pass takes, against what the check before it says: peaks of a process's resident memory."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, ROUTED_ONLY, VARIANTS
from transformers import AutoConfig, AutoModelForCausalLM

import duorl
from duorl import agents, envs, learners
from duorl.models.footprint import Batch, Keeps, peak_bytes
from duorl.routed_pass import RoutedPass
from duorl.routers import ConstantRouter

MIB = 2**20
LENGTH = 4096
TRAINED = 2048  # tokens of a window in a training
_KNOWN = {**FAMILIES, **ROUTED_ONLY, **VARIANTS}
_SIZES = {"num_hidden_layers": 2, "n_layer": 2, "num_layers": 2, "max_position_embeddings": 8192, "n_positions": 8192}
_SIZES |= {"num_attention_heads": 2, "n_head": 2, "num_heads": 2, "num_key_value_heads": 1}
_OWN: dict[str, dict[str, Any]] = {
    "helium": {"head_dim": 16},
    "diffllama": {"num_key_value_heads": 2},
    "qwen3_5_text": {
        "num_hidden_layers": 4,
        "layer_types": [*["linear_attention"] * 3, "full_attention"],
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
    },
}
# Families with a kernel, a mask, softcapping, own products, one key for all heads, masks of heads, linear attention.
_TRAINED = ["llama", "mistral", "gemma2", "bloom", "falcon", "falcon 1B, alibi", "falcon 40B", "gpt_neo"]
_TRAINED += ["qwen3_5_text"]
_READERS = [*FAMILIES, "falcon 1B, alibi", "falcon 40B"]
CASES = [
    *((family, "routed", "nothing", "float32") for family in [*_READERS, *ROUTED_ONLY]),
    *((family, "reference", "nothing", "float32") for family in _READERS),
    *((family, "routed", "everything", "float32") for family in _TRAINED),
    *((family, "reference", "everything", "float32") for family in ("llama", "gemma2", "bloom", "falcon")),
    *((family, "routed", "nothing", "bfloat16") for family in ("llama", "gemma2", "bloom", "falcon", "gpt_neo")),
    *((family, "reference", "nothing", "bfloat16") for family in ("llama", "bloom")),
    *((family, "routed", "everything", "bfloat16") for family in ("bloom", "gpt_neo")),
]


def sized(family: str, dtype: torch.dtype, **more: Any):
    """A duo model of 2 layers, 2 heads and 8,192 positions."""
    known = _KNOWN[family]
    sizes = {name: value for name, value in _SIZES.items() if name in known}
    config = AutoConfig.for_model(family.split()[0].strip(","), **{**known, **sizes, **_OWN.get(family, {}), **more})
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


def resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def growth(work: Callable[[], None]) -> int:
    """Bytes by which the process grows at its peak in some work."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def measured(case: tuple[str, Any, Keeps, str]) -> tuple[int, int]:
    """Bytes that a case takes, and that it is said to take."""
    torch.set_num_threads(1)
    family, context, keeps, precision = case
    dtype = getattr(torch, precision)
    model, make = sized(family, dtype), learned if keeps == "everything" else steered
    length = TRAINED if keeps == "everything" else LENGTH
    tokens = torch.randint(61, (1, length + 1))
    make(model, tokens[:, :17], context)()  # kernels are loaded
    work = make(model, tokens, context)
    return growth(work), peak_bytes(model.config, Batch(1, length, keeps, context), dtype)


@pytest.fixture(scope="module")
def apart():
    """A process of its own for all cases: it has one thread, and nothing else is measured."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the system does not forget peaks of memory")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        yield lambda case: pool.apply_async(measured, (case,)).get(60)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_no_pass_takes_more_than_is_said(case, apart):
    grown, said = apart(case)
    assert grown <= said, f"{grown / MIB:.0f} MiB, and {said / MIB:.0f} said"
    assert said <= 3 * max(grown, 100 * MIB), f"{grown / MIB:.0f} MiB, and {said / MIB:.0f} said"
