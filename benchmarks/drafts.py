"""What drafts are worth: acceptance, tokens per pass and speed against plain decoding: docs/explanation/drafts.md.

    python -m benchmarks.drafts --out docs/results/drafts.json
    python -m benchmarks.drafts --model smollm2 --dtype bfloat16 --search_device cuda --processes 14
    python -m benchmarks.drafts --router runs/mine/router --router runs/soft/router

Routers for a range of prices draft at the compute of the best fixed pattern, which a search on router text finds.

Every prompt is the beginning of a window of the evaluation split. All ways of decoding go on with it, one after the
other, so that a slow moment of the machine affects all. Every way must write the tokens of plain decoding. *Speed* is
plain decoding's time divided by the way's: the median over prompts, and its 95 % interval. A way with a `Pace` keeps
it from prompt to prompt; it meets two prompts before the clock starts. Processes share the prompts, and each of them
begins with fresh paces.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from scipy.stats import binom
from torch import Tensor

import duorl
from benchmarks.processes import side_by_side
from benchmarks.record import record
from duorl.closeness import same_token
from duorl.markdown import grid
from duorl.models import DuoForCausalLM, Pace
from duorl.oracle import fixed_patterns
from duorl.oracle.patterns import FixedPattern, PatternMethod
from duorl.routers import ConstantRouter, PatternRouter, Router
from duorl.routers import load as load_router
from duorl.runs.allocator import keep_freed_memory

CORPORA = {"stdlib-code": "code", "stdlib-docs": "prose"}
WARM_UP = 2  # prompts
LOOKUP = 8  # tokens that follow the last ones earlier in the text
CHOSEN_ON = 16  # windows of router text that choose the fixed pattern
SPENDS = 0.4  # compute of the fixed pattern, at most

Way = dict[str, object]
"""Options of `generate`."""


def ways(routers: dict[str, Router], lengths: Sequence[int]) -> dict[str, Way]:
    """All ways of decoding, by name; plain is first.

    Every router drafts with a pace, and as many tokens as each of the lengths says. The first one is also tried
    together with tokens that are looked up in the text.
    """
    found: dict[str, Way] = {"plain": {}, "lookup": _lookup()}
    for name, router in routers.items():
        found[name] = {"draft": router, "draft_tokens": Pace()}
        found |= {f"{name}, always {length}": {"draft": router, "draft_tokens": length} for length in lengths}
    first = next(iter(routers))
    return found | {f"{first}, and lookup": {"draft": routers[first], "draft_tokens": Pace()} | _lookup()}


def _lookup() -> Way:
    return {"prompt_lookup_num_tokens": LOOKUP}


@dataclass(frozen=True)
class Decoding:
    """All ways of decoding one model, for processes that share the prompts.

    Args:
        model: name of the model.
        dtype: its precision.
        device: where it runs.
        routers: those that draft.
        lengths: of drafts without a pace.
        new: tokens that are written.
    """

    model: str
    dtype: str
    device: str
    routers: dict[str, Router]
    lengths: Sequence[int]
    new: int

    def __call__(self, prompts: Tensor) -> list[dict[str, dict]]:
        """See `decode`, for prompts (N, P); those of the warm-up are left out."""
        model, known = loaded(self.model, self.dtype, self.device), ways(self.routers, self.lengths)
        return [decode(model, prompt[None].to(model.device), known, self.new) for prompt in prompts][WARM_UP:]


@lru_cache(maxsize=1)
def loaded(name: str, dtype: str, device: str) -> DuoForCausalLM:
    """A model, once in every process."""
    return duorl.load(name, dtype=dtype, device=device)


def rows(runs: dict[str, list[dict[str, dict]]]) -> list[dict]:
    """A row per text and way of decoding, of the runs of every text."""
    return [
        {"text": text, "way": way, **_summary([run["plain"] for run in each], [run[way] for run in each])}
        for text, each in runs.items()
        for way in each[0]
    ]


def decode(model: DuoForCausalLM, prompt: Tensor, known: dict[str, Way], new: int) -> dict[str, dict]:
    """Seconds, tokens, and drafts of every way with one prompt (1, P)."""
    found = {}
    for name, way in known.items():
        started = time.perf_counter()
        written = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            **way,
        )
        seconds, tokens = time.perf_counter() - started, written.sequences[0].tolist()
        found[name] = {"seconds": seconds, "tokens": tokens, "drafts": getattr(written, "drafts", None)}
    return found


def _summary(plain: Sequence[dict], own: Sequence[dict]) -> dict:
    pairs = list(zip(plain, own, strict=True))
    drafts = [run["drafts"] for run in own if run["drafts"] is not None]
    passes, drafted = sum(one.passes for one in drafts), sum(one.drafted for one in drafts)
    accepted = sum(one.accepted for one in drafts)
    return {
        "prompts": len(pairs),
        "equal": sum(one["tokens"] == other["tokens"] for one, other in pairs) / len(pairs),
        "speed": _median([one["seconds"] / other["seconds"] for one, other in pairs]),
        "acceptance": accepted / drafted if drafted else None,
        "tokens_per_pass": 1 + accepted / passes if passes else None,
    }


def _median(values: Sequence[float]) -> list[float]:
    """The median, and its 95 % interval by order statistics."""
    rising, count = np.sort(values), len(values)
    below = max(1, int(binom.ppf(0.025, count, 0.5)))
    return [float(np.median(rising)), float(rising[below - 1]), float(rising[count - below])]


def markdown(table: list[dict]) -> str:
    """The rows as a table."""
    head = ("text", "way", "same text", "acceptance", "tokens per pass", "speed")
    lines = []
    for row in table:
        middle, low, high = row["speed"]
        shares = ["" if row[key] is None else f"{row[key]:.2f}" for key in ("acceptance", "tokens_per_pass")]
        speed = f"{middle:.2f} ({low:.2f} to {high:.2f})"
        lines.append([row["text"], row["way"], f"{100 * row['equal']:.0f} %", *shares, speed])
    return grid(head, lines, numbers=range(2, 6))


def draft_patterns(model: DuoForCausalLM, windows: Tensor) -> list[FixedPattern]:
    """The best fixed pattern of every number of big layers, by acceptance on the first windows (W, T+1)."""
    method: PatternMethod = "enumeration" if model.num_layers <= 12 else "greedy"
    return fixed_patterns(model, windows[:CHOSEN_ON], method=method, closeness=same_token)


def main() -> None:
    """Measure, write the JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="duo-tiny")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompts", type=int, default=100, help="of each text")
    parser.add_argument("--length", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens that are written")
    parser.add_argument("--lengths", type=int, nargs="*", default=[2, 4, 8], help="of drafts without a pace")
    parser.add_argument("--router", type=Path, action="append", default=[], help="folder of a router that drafts")
    parser.add_argument("--search_device", help="finds the fixed pattern, and calibrates")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--processes", type=int, default=1, help="that share the threads and the prompts")
    parser.add_argument("--out", type=Path, default=Path("runs/drafts.json"))
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    model = duorl.load(options.model, dtype=options.dtype, device=options.search_device or options.device)
    tokenizer = duorl.load_tokenizer(options.model)
    training = duorl.load_windows(list(CORPORA), tokenizer, split="router", length=128)[:CHOSEN_ON].to(model.device)
    patterns = draft_patterns(model, training)
    fixed = next(pattern for pattern in reversed(patterns) if pattern.compute <= SPENDS)
    routers: dict[str, Router] = {"all-small": ConstantRouter("small"), "best fixed": PatternRouter(fixed.route)}
    for folder in options.router:
        router = load_router(folder).to(model.device).calibrated(model, training, compute=fixed.compute)
        routers[folder.parent.name] = router.to(options.device)

    def prompts(corpus: str) -> tuple[Tensor, ...]:
        windows = duorl.load_windows([corpus], tokenizer, split="evaluation", length=options.length)
        return windows[: options.prompts + WARM_UP * options.processes, :-1].tensor_split(options.processes)

    decoding = Decoding(options.model, options.dtype, options.device, routers, options.lengths, options.new)
    with side_by_side(options.processes) as pool:
        runs = {text: list(chain(*pool.map(decoding, prompts(corpus)))) for corpus, text in CORPORA.items()}
    table = rows(runs)
    record(options.out, rows=table, fixed=fixed.route)
    print(markdown(table))


if __name__ == "__main__":
    main()
