"""The shipped model is worth routing: measured on held-out text, once."""

import pytest
import torch

import duorl
import duorl.oracle
from duorl.evaluation.compare import measure
from duorl.models.loading import EMBEDDED
from duorl.routers import ConstantRouter


@pytest.fixture(scope="module")
def windows():
    tokenizer = duorl.load_tokenizer("duo-tiny")
    return duorl.load_windows("stdlib-code", tokenizer, split="evaluation", length=128)


def test_it_is_small():
    assert (EMBEDDED["duo-tiny"] / "model.safetensors").stat().st_size <= 12 * 2**20
    assert duorl.load("duo-tiny").num_layers == 8


@pytest.mark.slow
def test_the_big_networks_are_worth_a_fifth_of_a_nat(windows):
    model = duorl.load("duo-tiny")
    small, big = (measure(model, ConstantRouter(action), windows[:128]).loss.mean(1) for action in ("small", "big"))
    difference = small - big
    assert difference.mean() - 2 * difference.std() / len(difference) ** 0.5 >= 0.20


@pytest.mark.slow
def test_the_oracle_with_one_big_layer_beats_all_big(windows):
    """Duo-LLM, Fig. 4b: the oracle's curve is a U."""
    table = duorl.oracle.exhaustive(duorl.load("duo-tiny"), windows[:6], context="reference")
    rows = table.by_budget()
    assert rows[1]["loss"] < rows[8]["loss"]
    best = min(range(9), key=lambda big: rows[big]["loss"])
    assert 1 < best < 8
    assert torch.isfinite(table.losses).all()
