"""How far each learner raises the acceptance of drafts: tables of docs/explanation/drafts.md.

    python -m benchmarks.acceptance --seeds 5 --out docs/results/acceptance.json
    python -m benchmarks.acceptance --model smollm2 --dtype bfloat16 --rate 0.003 --device cuda --processes 12

Acceptance is the share of tokens whose most likely next token is that of all-big: what greedy decoding keeps of a
draft. Every learner trains one router for a range of prices, from equally many layer decisions of the router split. It
is measured on the evaluation split, in the routed context, and compared with the others at equal compute. Prices range
from 0.15 to 2.6 times what all-big is better than all-small: in nats of loss, in nats of distance, or in accepted
tokens. Fixed patterns are chosen on router text, for every number of big layers, by acceptance. Of every router, the
fixed patterns too, two steps are mixed (`duorl.evaluation.Frontier`), those with the highest acceptance on router text.
All ladders are kept beside the JSON; --again makes the tables from them, without training.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path

import torch

import duorl
from benchmarks.drafts import CHOSEN_ON, draft_patterns
from benchmarks.processes import side_by_side
from benchmarks.record import record
from duorl import agents
from duorl.closeness import minus_divergence, same_token
from duorl.corpus import Windows, cut, documents
from duorl.costs import BIG, SMALL
from duorl.envs import Lockstep
from duorl.evaluation import Frontier, Ladder
from duorl.evaluation.budgets import MeasuredText, load_texts, save_texts
from duorl.evaluation.statistics import Estimate
from duorl.files import write_json
from duorl.learners import Soft
from duorl.learners.base import Learner
from duorl.markdown import grid
from duorl.prices import ladder
from duorl.rewards import Acceptance, LossImprovement, Reward, TeacherKL
from duorl.routed_pass import RoutedPass
from duorl.routers import ConstantRouter, HeadRouter, PatternRouter, Router, spent
from duorl.runs.allocator import keep_freed_memory

CORPORA = ("stdlib-code", "stdlib-docs")
WINDOW = 128
CHEAPEST, DEAREST = 0.15, 2.6  # prices, in what all-big is better than all-small
STEPS = 6  # prices at which a router is measured
TARGETS = (0.25, 0.5, 0.75)
BEYOND = 0.05  # on other text a router spends a little less or more
MIXED_ON = 64  # windows of router text that decide which steps are mixed
TEXT = "evaluation split"  # name of the kept ladders
FIXED, SOFT = "best fixed", "soft, distance"  # rivals


@dataclass(frozen=True)
class Stage:
    """A training: a learner, its reward, and the unit of its price: loss, distance or acceptance."""

    learner: Callable[..., Learner]
    reward: Reward
    unit: str
    copies: int = 2
    share: float = 1.0  # of the decisions


def variants(rate: float) -> dict[str, list[Stage]]:
    """The trainings of every router, one after the other; `rate` is the learning rate of REINFORCE and ReinMax."""
    reinforce = partial(agents.REINFORCE, learning_rate=rate)
    reinmax = partial(agents.ReinMax, learning_rate=rate)
    soft, closer = partial(Soft, updates=None), partial(Soft, updates=None, target="teacher")
    accepted, likely = Acceptance(), Acceptance(sampled=True)
    return {
        "PPO, acceptance": [Stage(agents.PPO, accepted, "acceptance")],
        "REINFORCE, acceptance": [Stage(reinforce, accepted, "acceptance")],
        "REINFORCE, chance of acceptance": [Stage(reinforce, likely, "acceptance")],
        "REINFORCE, distance": [Stage(reinforce, TeacherKL(), "distance")],
        "REINFORCE, distance, then acceptance": [
            Stage(reinforce, TeacherKL(), "distance", share=0.5),
            Stage(reinforce, accepted, "acceptance", share=0.5),
        ],
        "ReinMax, chance of acceptance": [Stage(reinmax, likely, "acceptance", copies=1)],
        "ReinMax, distance": [Stage(reinmax, TeacherKL(), "distance", copies=1)],
        "soft, loss": [Stage(soft, LossImprovement(), "loss", copies=1)],
        "soft, distance": [Stage(closer, TeacherKL(), "distance", copies=1)],
        "soft, distance, then REINFORCE, acceptance": [
            Stage(closer, TeacherKL(), "distance", copies=1, share=0.5),
            Stage(partial(reinforce, learning_rate=rate / 3), accepted, "acceptance", share=0.5),
        ],
    }


@dataclass(frozen=True)
class Study:
    """A comparison of the variants on one model.

    Args:
        model: name of the model.
        dtype: its precision.
        device: where it runs.
        decisions: layer decisions of every router's training.
        rate: see `variants`.
        held_out: windows that measure.
        folder: keeps what is done, so that the same call goes on.
    """

    model: str
    dtype: str
    device: str
    decisions: int
    rate: float
    held_out: int
    folder: Path

    @cached_property
    def loaded(self) -> tuple[duorl.DuoForCausalLM, Windows, Windows]:
        """The model, windows of the router split, and windows of the evaluation split."""
        return material(self.model, self.dtype, self.device, self.held_out)

    @cached_property
    def gaps(self) -> dict[str, float]:
        """By unit, what all-big is better than all-small on router text."""
        model, training, _ = self.loaded
        small, big = (RoutedPass(model, training.tokens[:CHOSEN_ON]).take_all(action) for action in (SMALL, BIG))
        return {
            "loss": (small.losses() - big.losses()).mean().item(),
            "distance": -small.compare(big, minus_divergence).mean().item(),
            "acceptance": 1 - small.compare(big, same_token).mean().item(),
        }

    def prices(self, unit: str) -> tuple[float, float]:
        """The range of prices, in a unit per all-big pass."""
        return CHEAPEST * self.gaps[unit], DEAREST * self.gaps[unit]

    def run(self, job: tuple[str, int]) -> Ladder:
        """Train a router with a seed and measure it, once."""
        name, seed = job
        place = self.folder / f"{name}-{seed}"
        if not (place / "time.json").exists():
            started, router = time.process_time(), None
            for stage in variants(self.rate)[name]:
                router = self.trained(stage, seed, place / "start", router)
            assert router is not None
            router.save_pretrained(place / "router")
            seconds = time.process_time() - started
            self.measured(router).save(place / "ladder.safetensors")
            write_json(place / "time.json", {"seconds": seconds})
        return Ladder.load(place / "ladder.safetensors")

    def trained(self, stage: Stage, seed: int, place: Path, start: Router | None) -> Router:
        """A router after a stage; it starts from another, whose prices are taken in the stage's unit."""
        model, training, _ = self.loaded
        options, prices = {}, self.prices(stage.unit)
        if start is not None:
            other = HeadRouter(**{**start.config, "prices": prices})
            other.load_state_dict(start.state_dict())
            other.save_pretrained(place)
            options["init"] = str(place)
        windows = 8 if stage.copies > 1 else 16  # per batch; the same number of tokens
        more = {"windows_per_batch": windows, "group_size": stage.copies, "seed": seed, "prices": prices}
        env = Lockstep(model, training.tokens, reward=stage.reward, **more)
        return stage.learner(env, **options).learn(int(self.decisions * stage.share))

    def measured(self, router: Router) -> Ladder:
        """A router at prices of its range on the evaluation split, and where these do not lead, calibrated."""
        model, training, held_out = self.loaded
        steps = [router.at(price=price) for price in ladder(tuple(router.config["prices"]), STEPS)]
        spends = [spent(model, step, training.tokens[:CHOSEN_ON]) for step in (steps[-1], steps[0])]
        for target in (TARGETS[0] - BEYOND, *TARGETS, TARGETS[-1] + BEYOND):
            if not spends[0] + BEYOND < target < spends[1] - BEYOND:
                steps.append(router.calibrated(model, training.tokens[:CHOSEN_ON], compute=target))
        return Ladder.climb(model, steps, held_out.tokens, training.tokens[:MIXED_ON])

    def fixed(self) -> Ladder:
        """The best fixed pattern of every number of big layers, by acceptance."""
        model, training, held_out = self.loaded
        path = self.folder / "fixed.safetensors"
        if not path.exists():
            steps = [PatternRouter(pattern.route) for pattern in draft_patterns(model, training.tokens)]
            path.parent.mkdir(parents=True, exist_ok=True)
            Ladder.climb(model, steps, held_out.tokens, training.tokens[:MIXED_ON]).save(path)
        return Ladder.load(path)

    def text(self, seeds: int) -> MeasuredText:
        """The ladders of all routers."""
        model, training, held_out = self.loaded
        ladders = {FIXED: [self.fixed()]}
        ladders |= {name: [self.run((name, seed)) for seed in range(seeds)] for name in variants(self.rate)}
        small, big = Ladder.climb(model, [ConstantRouter("small"), ConstantRouter("big")], held_out.tokens).losses
        fixed, all_big = (model.flops.token(torch.tensor(spends), (WINDOW + 1) / 2) for spends in (0.0, 1.0))
        flops = torch.stack([fixed, all_big - fixed])
        return MeasuredText(ladders, held_out.files, training.files[:MIXED_ON], small, big, flops, WINDOW)

    def seconds(self, name: str, seeds: int) -> float:
        """Mean processor time of the trainings."""
        kept = [json.loads((self.folder / f"{name}-{seed}" / "time.json").read_text()) for seed in range(seeds)]
        return sum(one["seconds"] for one in kept) / seeds


def rows(text: MeasuredText, seconds: dict[str, float]) -> list[dict]:
    """A row per router: acceptance at every target, and paired differences to two rivals."""
    frontiers = {
        name: Frontier(seeds, text.files, text.chosen_files, goal="top1_agreement")
        for name, seeds in text.ladders.items()
    }
    at = {name: {target: frontier.at(target) for target in TARGETS} for name, frontier in frontiers.items()}
    return [
        {
            "name": name,
            "seeds": len(text.ladders[name]),
            "seconds": seconds.get(name),
            "targets": {
                str(target): {
                    "acceptance": _said(own),
                    **{f"minus {rival}": _said(_minus(own, at[rival][target])) for rival in (FIXED, SOFT)},
                }
                for target, own in levels.items()
            },
        }
        for name, levels in at.items()
    ]


def again(path: Path) -> list[dict]:
    """The rows of a kept study, from its ladders."""
    seconds = {row["name"]: row["seconds"] for row in json.loads(path.read_text())["rows"] if row["seconds"]}
    return rows(load_texts(ladders_of(path))[TEXT], seconds)


def ladders_of(path: Path) -> Path:
    """The file of the ladders beside that of the rows."""
    return path.with_name(f"{path.stem}-ladders.safetensors.gz")


def _minus(own: Estimate | None, rival: Estimate | None) -> Estimate | None:
    return None if own is None or rival is None or own is rival else own - rival


def _said(found: Estimate | None) -> list[float] | None:
    return None if found is None else [found.value, *(found.interval or ())]


@lru_cache(maxsize=1)
def material(name: str, dtype: str, device: str, held_out: int) -> tuple[duorl.DuoForCausalLM, Windows, Windows]:
    """A model, windows of the router split, and the first ones of the evaluation split."""
    model, tokenizer = duorl.load(name, dtype=dtype, device=device), duorl.load_tokenizer(name)
    learned, measured = (cut(documents(CORPORA, split), tokenizer, WINDOW) for split in ("router", "evaluation"))
    assert learned is not None and measured is not None
    return model, learned._replace(tokens=learned.tokens.to(model.device)), measured.first(held_out)


def markdown(table: list[dict]) -> str:
    """The rows as a table."""
    head = ["router", "processor time", *(f"at {float(t):.0%}" for t in table[0]["targets"])]
    head += [f"minus {rival}, at {float(t):.0%}" for rival in (FIXED, SOFT) for t in table[0]["targets"]]
    lines = []
    for row in table:
        levels = row["targets"].values()
        spent = "" if row["seconds"] is None else f"{row['seconds'] / 60:.1f} min"
        differences = [_cell(level[f"minus {rival}"], "+") for rival in (FIXED, SOFT) for level in levels]
        lines.append([row["name"], spent, *(_cell(level["acceptance"]) for level in levels), *differences])
    return grid(head, lines, numbers=range(1, len(head)))


def _cell(found: list[float] | None, sign: str = "") -> str:
    if found is None:
        return ""
    value, *interval = found
    if not sign:
        return f"{value:.3f}"
    return f"{value:+.3f}" + (" ({:+.3f}, {:+.3f})".format(*interval) if interval else "")


def main() -> None:
    """Run all trainings, write the JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="duo-tiny")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--decisions", type=int, default=4_000_000, help="layer decisions of every router's training")
    parser.add_argument("--rate", type=float, default=1e-2, help="learning rate of REINFORCE and ReinMax")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=128, help="windows that measure the routers")
    parser.add_argument("--processes", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, default=Path("runs/acceptance"), help="keeps what is done, to go on")
    parser.add_argument("--out", type=Path, default=Path("runs/acceptance.json"))
    parser.add_argument("--again", action="store_true", help="only make the tables of --out, from its kept ladders")
    options = parser.parse_args()
    if options.again:
        write_json(options.out, {**json.loads(options.out.read_text()), "rows": (table := again(options.out))})
        return print(markdown(table))
    keep_freed_memory()
    sizes = {"decisions": options.decisions, "rate": options.rate, "held_out": options.windows}
    place = options.folder / "-".join(map(str, (Path(options.model).name, options.dtype, *sizes.values())))
    study = Study(options.model, options.dtype, options.device, folder=place, **sizes)
    jobs = [(name, seed) for seed in range(options.seeds) for name in variants(options.rate)]
    with side_by_side(options.processes) as pool:
        list(pool.map(study.run, jobs))
        text = pool.submit(study.text, options.seeds).result()
    save_texts({TEXT: text}, ladders_of(options.out))
    table = rows(text, {name: study.seconds(name, options.seeds) for name in variants(options.rate)})
    record(options.out, rows=table)
    print(markdown(table))


if __name__ == "__main__":
    main()
