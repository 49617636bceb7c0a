"""One router for all prices against one router per price: the table of docs/how-to/budgets.md.

    python -m benchmarks.prices --out docs/results/prices.json

REINFORCE is trained on duo-tiny's router text: once with the price as an input, and once at each of five prices. Each
training has equally many layer decisions, so the single routers have five times the training. Frontiers are measured in
the routed context, on files of the router split that no training used, and compared by their hypervolume. Of each, two
steps are mixed; the text of the trainings decides which. The frontier of the fixed patterns is beside them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import Tensor

from benchmarks.credit import text
from benchmarks.record import record
from duorl import agents
from duorl.envs import Lockstep
from duorl.evaluation import Baseline, EvaluationOptions, Frontier, Ladder
from duorl.evaluation.statistics import Estimate
from duorl.markdown import grid
from duorl.prices import ladder
from duorl.rewards import LossImprovement
from duorl.routers import ConstantRouter, PatternRouter, Router
from duorl.runs.allocator import keep_freed_memory

PRICES, STEPS = (0.02, 0.8), 5
TARGETS = (0.25, 0.5)
HELD_OUT = 96  # windows
CHOSEN_ON = 64  # windows of the trainings' text that decide which steps are mixed


def learn(decisions: int, seed: int, price: float | None) -> Router:
    """A router for the price, or for all of them."""
    model, training, _ = text()
    options = {"windows_per_batch": 8, "group_size": 2, "seed": seed}
    reward, prices = LossImprovement(price or PRICES[0]), None if price else PRICES
    return agents.REINFORCE(Lockstep(model, training, reward=reward, prices=prices, **options)).learn(decisions)


def ladders(decisions: int, seed: int) -> dict[str, Ladder]:
    """Train and measure the three frontiers."""
    model, training, held_out = text()
    windows = held_out.tokens[:HELD_OUT]
    steps = ladder(PRICES, STEPS)[::-1]
    one = learn(decisions, seed, None)
    rounds = EvaluationOptions(fixed_windows=24, final_windows=96)
    ranked = {"method": "enumeration", "actions": ("small", "big"), "price": 0.0, "options": rounds}
    patterns = [PatternRouter(route) for route in Baseline.search(model, training, **ranked).per_big().values()]
    routers = {
        "best fixed": patterns,
        "one router per price": [learn(decisions, seed, price) for price in steps],
        "one router for all prices": [one.at(price=price) for price in steps],
    }
    return {name: Ladder.climb(model, own, windows, training[:CHOSEN_ON]) for name, own in routers.items()}


def rows(found: dict[str, Ladder], worst: Tensor) -> list[dict]:
    """A row per frontier: hypervolume, and paired difference to one router per price at some computes."""
    files = text()[2].files[:HELD_OUT]
    frontiers = {name: Frontier([ladder], files) for name, ladder in found.items()}
    at = {name: {target: frontier.at(target) for target in TARGETS} for name, frontier in frontiers.items()}
    separate = at["one router per price"]
    return [
        {
            "name": name,
            "compute": list(frontier.range),
            "hypervolume": frontier.area(worst).value,
            "minus": {str(target): _minus(at[name][target], separate[target]) for target in TARGETS},
        }
        for name, frontier in frontiers.items()
    ]


def _minus(own: Estimate | None, rival: Estimate | None) -> list[float] | None:
    """Difference of losses at a compute, and its interval."""
    if own is None or rival is None:
        return None
    difference = own - rival
    return [difference.value, *(difference.interval or ())]


def markdown(table: list[dict]) -> str:
    """The rows as a table."""
    head = ["frontier", "spends", "hypervolume", *(f"minus one per price, at {target:g}" for target in TARGETS)]
    lines = []
    for row in table:
        low, high = row["compute"]
        minus = [
            "" if cell is None else f"{cell[0]:+.4f} ({cell[1]:+.4f}, {cell[2]:+.4f})" for cell in row["minus"].values()
        ]
        lines.append([row["name"], f"{low:.2f} to {high:.2f}", f"{row['hypervolume']:.4f}", *minus])
    return grid(head, lines)


def main() -> None:
    """Train, measure, write the JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decisions", type=int, default=1_000_000, help="layer decisions of every training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/prices.json"))
    options = parser.parse_args()
    keep_freed_memory()
    model, _, windows = text()
    (small,) = Ladder.climb(model, [ConstantRouter("small")], windows.tokens[:HELD_OUT]).losses
    table = rows(ladders(options.decisions, options.seed), small)
    record(options.out, rows=table)
    print(markdown(table))


if __name__ == "__main__":
    main()
