"""Compares methods of reducing variance and of assigning credit: the tables of docs/explanation/learning.md.

    python -m benchmarks.credit --out docs/results/credit.json
    python -m benchmarks.credit --model smollm2 --dtype bfloat16 --out docs/results/credit-smollm2.json

Every variant learns from equally many layer decisions at one price, with several seeds. Its return is measured in the
routed context, on files of the router split that no training used, and compared with that of the first variant and the
same seed. The evaluation split is not used. The spread of the gradient is measured before and after the training. It is
the trace of the covariance of single updates' gradients, divided by the squared norm of their mean.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

import duorl
from benchmarks.processes import side_by_side
from benchmarks.record import record
from duorl import agents
from duorl.agents.stable_baselines import StableBaselinesAgent
from duorl.corpus import Windows, cut, documents
from duorl.envs import Lockstep
from duorl.evaluation.measure import measure
from duorl.evaluation.statistics import estimate
from duorl.learners import Soft
from duorl.learners.base import Learner
from duorl.markdown import grid
from duorl.rewards import LogitLensShaping, LossImprovement, Reward, TeacherKL
from duorl.routers import ConstantRouter, PatternRouter, Router
from duorl.routers import load as load_router
from duorl.runs.allocator import keep_freed_memory

DEFAULT_PRICE = 0.3
HELD_OUT = 256  # windows
PATTERN = [1, 1, 1, 1, 1, 2, 1, 2]  # the best pattern with two big layers of duo-tiny, on router text
DEEP = 12  # layers; deeper models have other variants
LEVELS = ("0.25", "0.5")  # of the compute, at which these are compared
HALF = "soft router, half as long"
RIVAL = "soft router"  # with which deep models' learners are compared too

Variants = dict[str, tuple[Callable[..., Learner] | None, dict]]
"""By name: a learner, and the options of its environment that are not the default. Without a learner: the router that
others start from. `share` is the share of the decisions.
"""


class BareLoss(Reward):
    """The default reward with minus the loss in place of the gain."""

    def __init__(self, price: float):
        self.price = price

    def __call__(self, step):
        """(N,) nats."""
        return (0.0 if step.loss is None else -step.loss) - self.price * step.compute


def shallow(price: float) -> Variants:
    """The variants for duo-tiny."""
    reinforce = agents.REINFORCE
    default = LossImprovement(price)
    return {
        "REINFORCE, leave-one-out of 2": (reinforce, {}),
        "REINFORCE, leave-one-out of 4, half the windows": (reinforce, {"group_size": 4, "windows_per_batch": 4}),
        "REINFORCE, no baseline": (partial(reinforce, baseline="none"), {}),
        "REINFORCE, mean of the layer": (partial(reinforce, baseline="mean"), {}),
        "REINFORCE, learned value": (partial(reinforce, baseline="value"), {}),
        "REINFORCE, bare loss, mean of the layer": (partial(reinforce, baseline="mean"), {"reward": BareLoss(price)}),
        "REINFORCE, bare loss, leave-one-out of 2": (reinforce, {"reward": BareLoss(price)}),
        "REINFORCE, later tokens' gains, 0.5 per token": (reinforce, {"token_discount": 0.5}),
        "REINFORCE, later tokens' gains, 0.95 per token": (reinforce, {"token_discount": 0.95}),
        "REINFORCE, distance to all-big": (reinforce, {"reward": TeacherKL(price)}),
        "REINFORCE, half distance, half label": (reinforce, {"reward": TeacherKL(price, share=0.5)}),
        "REINFORCE, intermediate predictions": (reinforce, {"reward": default + LogitLensShaping(0.3)}),
        "REINFORCE, from the fixed pattern": (partial(reinforce, init="pattern"), {}),
        "REINFORCE, from the soft router": (partial(reinforce, init="soft", learning_rate=1e-3), {}),
        "PPO, learned value": (agents.PPO, {"group_size": 1, "windows_per_batch": 16}),
        "PPO, leave-one-out of 2": (agents.PPO, {}),
        "ReinMax": (agents.ReinMax, {"group_size": 1, "windows_per_batch": 16}),
        "ReinMax, half corrected": (partial(agents.ReinMax, correction=0.5), {}),
        "ReinMax, fully corrected": (partial(agents.ReinMax, correction=1.0), {}),
    }


def deep(price: float) -> Variants:
    """The variants for models of many layers."""
    one = {"group_size": 1}
    sharp = partial(agents.ReinMax, init="soft", learning_rate=3e-3, last_sharpness=30.0)
    return {
        "PPO, leave-one-out of 2": (agents.PPO, {}),
        "PPO, learned value": (agents.PPO, one),
        "PPO, distance to all-big": (agents.PPO, {"reward": TeacherKL(price)}),
        "PPO, mean effect on later tokens": (agents.PPO, {"later_effects": True}),
        "REINFORCE, leave-one-out of 2": (partial(agents.REINFORCE, learning_rate=3e-3), {}),
        "REINFORCE, mean effect on later tokens": (
            partial(agents.REINFORCE, learning_rate=3e-3),
            {"later_effects": True},
        ),
        "ReinMax": (agents.ReinMax, one),
        "ReinMax, learning rate 0.003": (partial(agents.ReinMax, learning_rate=3e-3), one),
        "ReinMax, least share 0.5": (partial(agents.ReinMax, least_share=0.5), one),
        HALF: (None, {}),
        RIVAL: (partial(Soft, updates=None), one),
        "soft router, then ReinMax, sharpness 3 to 30": (partial(sharp, first_sharpness=3.0), {**one, "share": 0.5}),
        "soft router, then ReinMax, sharpness 10 to 30": (partial(sharp, first_sharpness=10.0), {**one, "share": 0.5}),
    }


@dataclass(frozen=True)
class Study:
    """A comparison of variants.

    Args:
        model: name of the model.
        dtype: its precision.
        device: where it runs.
        decisions: layer decisions of every training.
        updates: gradients for a spread; 0: no spreads.
        held_out: windows that measure.
        folder: keeps what is done, so that the same call goes on.
    """

    model: str
    dtype: str
    device: str
    decisions: int
    updates: int
    held_out: int
    folder: Path

    @property
    def material(self) -> tuple[duorl.DuoForCausalLM, Tensor, Windows]:
        """The model, windows to learn from, and windows of other files."""
        return text(self.model, self.dtype, self.device, self.held_out)

    @property
    def price(self) -> float:
        """Nats per all-big pass."""
        return self.material[0].config.price or DEFAULT_PRICE

    @property
    def variants(self) -> Variants:
        """What is compared; the first is the yardstick."""
        return shallow(self.price) if self.material[0].num_layers <= DEEP else deep(self.price)

    @property
    def start(self) -> Path:
        """Folder of the soft router that some variants start from, with every seed."""
        return self.folder / "soft"

    def prepare(self) -> None:
        """Train the routers from which some variants start."""
        model, training, _ = self.material
        PatternRouter(PATTERN).save_pretrained(self.folder / "pattern")
        if not self.start.exists():
            env = Lockstep(model, training, reward=LossImprovement(self.price), windows_per_batch=8)
            updates = self.decisions // (env.layers * env.num_tokens * (1 if model.num_layers <= DEEP else 2))
            Soft(env, updates=max(1, updates)).learn(1).save_pretrained(self.start)

    def learner(self, name: str, seed: int) -> Learner:
        """A new learner of a variant."""
        factory, options = self.variants[name]
        assert factory is not None
        if isinstance(factory, partial) and "init" in factory.keywords:
            factory = partial(factory, init=str(self.folder / factory.keywords["init"]))
        model, training, _ = self.material
        usual = {"windows_per_batch": 8, "group_size": 2, "reward": LossImprovement(self.price), "seed": seed}
        own = {key: value for key, value in options.items() if key != "share"}
        return factory(Lockstep(model, training, **{**usual, **own}))

    def run(self, job: tuple[str, int]) -> dict:
        """Train a variant with a seed, once; returns, and the spread of the gradient before and after."""
        name, seed = job
        kept = self.folder / f"{name}-{seed}.json"
        if not kept.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(self._study(name, seed)))
        return json.loads(kept.read_text())

    def _study(self, name: str, seed: int) -> dict:
        spreads: dict[str, float | None] = {"fresh": None, "trained": None}
        factory, options = self.variants[name]
        if factory is None:
            return {"name": name, "seed": seed, **self.measured(load_router(self.start)), **spreads}
        spread = self.updates if seed == 0 else 0
        spreads["fresh"] = gradient_spread(self.learner(name, seed), spread)
        agent = self.learner(name, seed)
        router = agent.learn(int(self.decisions * options.get("share", 1.0)))
        found = {"name": name, "seed": seed, **self.measured(router)}
        return found | spreads | {"trained": gradient_spread(agent, spread)}

    @torch.no_grad()
    def measured(self, router: Router) -> dict:
        """Held-out returns per window at the price, the mean compute, and in deep models losses at equal compute."""
        model, _, (windows, _) = self.material
        reference = measure(model, ConstantRouter("small"), windows).loss
        found = measure(model, router, windows)
        returns = (reference - found.loss - self.price * found.compute).mean(1)
        levels = LEVELS if model.num_layers > DEEP else ()
        fitted = {level: router.calibrated(model, windows, compute=float(level)) for level in levels}  # without labels
        losses = {level: measure(model, one, windows).loss.mean().item() for level, one in fitted.items()}
        return {"returns": returns.tolist(), "compute": found.compute.mean().item(), "losses": losses}

    def rows(self, found: list[dict]) -> list[dict]:
        """A row per variant: mean return, paired difference to the first with the same seed, spread of the gradient."""
        by_name = {name: [one for one in found if one["name"] == name] for name in self.variants}
        stacked = {name: torch.tensor([one["returns"] for one in seeds]) for name, seeds in by_name.items()}
        first, rival, files = next(iter(stacked.values())), stacked.get(RIVAL), self.material[2].files

        def difference(values: Tensor, other: Tensor) -> list[float]:
            found = estimate(values - other, files)
            return [found.value, *(found.interval or ())]

        return [
            {
                "name": name,
                "seeds": len(values),
                "return": values.mean().item(),
                "compute": sum(one["compute"] for one in by_name[name]) / len(values),
                "losses": {
                    level: sum(one["losses"][level] for one in by_name[name]) / len(values)
                    for level in by_name[name][0]["losses"]
                },
                "minus": difference(values, first),
                **({} if rival is None else {"minus_rival": difference(values, rival)}),
                "fresh": by_name[name][0]["fresh"],
                "trained": by_name[name][0]["trained"],
            }
            for name, values in stacked.items()
        ]


@lru_cache(maxsize=1)
def text(
    name: str = "duo-tiny", dtype: str = "float32", device: str = "cpu", held_out: int = HELD_OUT
) -> tuple[duorl.DuoForCausalLM, Tensor, Windows]:
    """A model, and windows of the router split: of files to learn from, and the first ones of other files."""
    model, tokenizer = duorl.load(name, dtype=dtype, device=device), duorl.load_tokenizer(name)
    files = documents(["stdlib-code", "stdlib-docs"], "router")
    apart = set(sorted({file.path for file in files})[::3])
    learned = cut([file for file in files if file.path not in apart], tokenizer, 128)
    others = cut([file for file in files if file.path in apart], tokenizer, 128)
    assert learned is not None and others is not None
    return model, learned.tokens, others.first(held_out)


def gradient_spread(agent: Learner, updates: int) -> float | None:
    """Trace of the covariance of an update's gradient over the squared norm of its mean; the policy does not change.

    Infinite if the mean of these updates cannot be told from noise; None without updates, and for learners of
    Stable-Baselines3.
    """
    if not updates or isinstance(agent, StableBaselinesAgent):
        return None
    agent.learning_rate = 0.0
    agent.router.requires_grad_(True)
    gradients = []
    for _ in range(updates):
        agent.update()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in agent.router.parameters()]))
    found = torch.stack(gradients)
    variance = found.var(0).sum()
    signal = found.mean(0).square().sum() - variance / updates  # minus the noise of the mean
    return (variance / signal).item() if signal > 0 else math.inf


def markdown(table: list[dict]) -> str:
    """The rows as a table; columns without a value are left out."""
    lines = []
    for row in table:
        minus = _difference(row["minus"]) if row is not table[0] else ""
        shown = {"learner": row["name"], "return": f"{row['return']:+.4f}", "minus the first's": minus}
        if "minus_rival" in row:
            shown[f"minus the {RIVAL}'s"] = _difference(row["minus_rival"]) if row["name"] != RIVAL else ""
        if "compute" in row:
            shown["compute"] = f"{row['compute']:.2f}"
        shown |= {f"loss at {level}": f"{loss:.3f}" for level, loss in row.get("losses", {}).items()}
        spreads = {f"spread, {key}": _spread(row[key]) for key in ("fresh", "trained")}
        lines.append(shown | (spreads if any(one["fresh"] for one in table) else {}))
    head = list(lines[0])
    return grid(head, (list(line.values()) for line in lines), numbers=range(1, len(head)))


def _difference(found: list[float]) -> str:
    return "{:+.4f} ({:+.4f}, {:+.4f})".format(*found)


def _spread(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if math.isfinite(value) else "noise alone"


def main() -> None:
    """Run all trainings, write the JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="duo-tiny")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--decisions", type=int, default=200_000, help="layer decisions of every training")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--updates", type=int, default=10, help="number of gradients for a spread; 0: no spreads")
    parser.add_argument("--windows", type=int, default=HELD_OUT, help="that measure the routers")
    parser.add_argument("--processes", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, default=Path("runs/credit"), help="keeps what is done, to go on")
    parser.add_argument("--out", type=Path, default=Path("runs/credit.json"))
    options = parser.parse_args()
    keep_freed_memory()
    sizes = {"decisions": options.decisions, "updates": options.updates, "held_out": options.windows}
    place = options.folder / "-".join(map(str, (Path(options.model).name, options.dtype, *sizes.values())))
    study = Study(options.model, options.dtype, options.device, folder=place, **sizes)
    jobs = [(name, seed) for seed in range(options.seeds) for name in study.variants]
    with side_by_side(options.processes) as pool:
        pool.submit(study.prepare).result()
        found = list(pool.map(study.run, jobs))
    table = study.rows(found)
    record(options.out, rows=table)
    print(markdown(table))


if __name__ == "__main__":
    main()
