"""What it takes to convert larger models and to train their routers, on paper: docs/explanation/large-models.md.

    python -m benchmarks.sizes

Nothing here is measured on these models. The sizes of the weights give FLOPs and memory; benchmarks/results/latest.json
has how many plain passes an update takes on the model of this package.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from transformers import LlamaConfig

from benchmarks import shapes
from duorl.markdown import grid
from duorl.models.config import DuoConfig
from duorl.models.families import small_size
from duorl.models.footprint import Batch, Keeps, peak_bytes, weight_bytes

LATEST = Path(__file__).parent / "results" / "latest.json"
SHAPES = {
    "1 B": shapes.SHAPES["1b"],
    "8 B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
    "70 B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
}
"""The paper's model, and Llama 3.1."""

SPEED = 0.4 * 989e12  # FLOPs per second: 40 % of an H100's peak in bfloat16
GPU = 80e9  # bytes
SMALL_RATIO = 16
CONVERTED = 1_228_800  # tokens of `distil`, as for SmolLM2
LEARNED = 2_000_000  # tokens of a router's training, 16 times those of docs/explanation/learning.md for SmolLM2
TOGETHER, WINDOW = 2048, 256  # tokens of an update, and of a window
LEARNERS: dict[str, Keeps] = {"PPO": "states", "ReinMax": "everything"}


def rows(latest: dict) -> list[dict]:
    """A row per model: hours on one GPU, memory, and GPUs that hold it."""
    passes = {row["name"].removeprefix("update of "): row["value"] for row in latest["rows"]}
    table = []
    for name, shape in SHAPES.items():
        backbone = LlamaConfig(**shape)
        config = DuoConfig(backbone=backbone.to_dict(), small_size=small_size(backbone, SMALL_RATIO))
        weights = weight_bytes(config, torch.bfloat16)
        forward = weights  # FLOPs of a token: 2 per weight, and a weight has 2 bytes
        row = {"model": name, "convert": CONVERTED * 3.5 * forward / SPEED / 3600, "weights": weights}
        for learner, keeps in LEARNERS.items():
            batch = Batch(TOGETHER // WINDOW, WINDOW, keeps)
            bytes_ = weights + peak_bytes(config, batch, torch.bfloat16, device=torch.device("cuda"))
            row[learner] = {
                "hours": LEARNED * passes[learner] * forward / SPEED / 3600,
                "bytes": bytes_,
                "gpus": math.ceil(bytes_ / GPU),
            }
        table.append(row)
    return table


def markdown(table: list[dict]) -> str:
    """The rows as a table."""
    head = ["model", "weights", "`distil`", *(f"{name}: {what}" for name in LEARNERS for what in ("time", "memory"))]
    lines = []
    for row in table:
        line = [row["model"], f"{row['weights'] / 1e9:,.0f} GB", _hours(row["convert"])]
        for name in LEARNERS:
            own = row[name]
            line += [_hours(own["hours"]), f"{own['bytes'] / 1e9:,.0f} GB, {own['gpus']} GPU{'s' * (own['gpus'] > 1)}"]
        lines.append(line)
    return grid(head, lines, numbers=range(1, len(head)))


def _hours(value: float) -> str:
    return f"{60 * value:.0f} min" if value < 1 else f"{value:.1f} h"


if __name__ == "__main__":
    print(markdown(rows(json.loads(LATEST.read_text()))))
