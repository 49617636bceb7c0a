"""What the parts of a conversion are worth: a table of docs/explanation/small-networks.md.

    python -m benchmarks.recipes --model smollm2 --other moby-dick.jsonl

Every variant makes small networks with equally many updates. The losses are those of the evaluation split of each text:
of the built-in texts, on which the networks learned, and of another one. All-big is the model itself.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.record import record
from duorl.corpus import load_windows, spread
from duorl.markdown import grid
from duorl.models.bases import cast_weights, find_base
from duorl.models.conversion import convert
from duorl.models.shared import cast_small
from duorl.runs.pretraining import Saving
from duorl.smalls import ConvertOptions, Making, held_out_losses
from duorl.smalls.recipe import ChooseOptions, DistilOptions, RegressOptions, Stage

_TEXTS = ("stdlib-code", "stdlib-docs")
_WINDOW, _MEASURED, _TOGETHER = 256, 32, 32
_ALL: tuple[Stage, ...] = ("choose", "regress", "distil")


@dataclass(frozen=True)
class Variant:
    """A recipe: its stages, options that are not the default, and the share of text that the model wrote itself."""

    stages: tuple[Stage, ...] = _ALL
    small_ratio: int = 16
    distil: dict = field(default_factory=dict)
    own_text: float = 0.0


VARIANTS = {
    "the recipe": Variant(),
    "without `regress`": Variant(stages=("choose", "distil")),
    "`choose` alone": Variant(stages=("choose",)),
    "learning rate 0.003": Variant(distil={"learning_rate": 3e-3}),
    "learning rate 0.0003": Variant(distil={"learning_rate": 3e-4}),
    "256 tokens per update, twice as many updates": Variant(distil={"tokens_per_update": 256}),
    "next token as the target": Variant(distil={"target": "text"}),
    "half of the text written by the model": Variant(own_text=0.5),
    "a quarter of the inner size, `--small_ratio 4`": Variant(small_ratio=4),
    "an eighth, `--small_ratio 8`": Variant(small_ratio=8),
}


@dataclass(frozen=True)
class Bench:
    """The model and the length of the stages.

    Args:
        model: name of the model.
        other: a text on which no network learns.
        tokens: of `distil`, and of `regress`.
        device: where they are made.
        folder: keeps what is done, so that the same call goes on.
    """

    model: str
    other: str
    tokens: int
    device: str
    folder: Path

    def run(self, name: str) -> dict:
        """The losses of a variant by text, made once."""
        kept = self.folder / name.replace("/", " ") / "losses.json"
        if not kept.exists():
            losses = self._make(VARIANTS[name], kept.parent)
            kept.write_text(json.dumps(losses))
        return json.loads(kept.read_text())

    def _make(self, variant: Variant, folder: Path) -> dict:
        options = ConvertOptions(
            model=self.model,
            out=str(folder),
            window=_WINDOW,
            small_ratio=variant.small_ratio,
            evaluation_windows=4,
            choose=ChooseOptions(tokens=16_384),
            regress=RegressOptions(tokens=self.tokens),
            distil=DistilOptions(**{"tokens": self.tokens, **variant.distil}),
        )
        base = find_base(self.model)
        duo = convert(base.load(), small_ratio=variant.small_ratio)
        cast_weights(duo, torch.bfloat16)
        nn.Module.to(duo, self.device)
        making = Making(duo, options, self._training(variant), self._windows("stdlib-code", "router"))
        before: Path | None = None
        for stage in variant.stages:
            place = folder / stage
            place.mkdir(parents=True, exist_ok=True)
            making.run(stage, place, lambda **_: None, after=before, callbacks=[Saving(lambda **_: None)])
            before = place
        cast_small(duo, torch.bfloat16)
        texts = {name: self._windows(name, "evaluation") for name in (*_TEXTS, self.other)}
        return {Path(name).stem: held_out_losses(duo, spread(windows, _MEASURED)) for name, windows in texts.items()}

    def _training(self, variant: Variant) -> Tensor:
        windows = torch.cat([self._windows(name, "model") for name in _TEXTS])
        if not variant.own_text:
            return windows
        own = self._own_text(int(self.tokens * variant.own_text) // _WINDOW)
        picked = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
        return torch.cat([own, windows[picked[: round(len(own) * (1 / variant.own_text - 1))]]])

    def _windows(self, text: str, split: str) -> Tensor:
        return _read(self.model, text, split)

    def _own_text(self, count: int) -> Tensor:
        """Windows that the model writes itself, at temperature 1 after a random token, (count, T+1)."""
        kept = self.folder / "own.json"
        if not kept.exists():
            base = find_base(self.model)
            writer = base.load(torch.bfloat16).eval().to(self.device)
            torch.manual_seed(0)
            written: list[list[int]] = []
            while len(written) < count:
                start = torch.randint(100, writer.config.vocab_size, (_TOGETHER, 1), device=self.device)
                length = {"min_new_tokens": _WINDOW, "max_new_tokens": _WINDOW}
                found = writer.generate(start, attention_mask=torch.ones_like(start), do_sample=True, top_k=0, **length)
                written += found.tolist()
            self.folder.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(written[:count]))
        return torch.tensor(json.loads(kept.read_text()))


@lru_cache
def _read(model: str, text: str, split: str) -> Tensor:
    return load_windows(text, find_base(model).tokenizer(), length=_WINDOW, split=split)


def markdown(found: dict[str, dict]) -> str:
    """A table: all-small and half big at random on each text."""
    texts = list(next(iter(found.values())))
    rows = [
        [name, *(f"{losses[text]['all_small']:.2f} / {losses[text]['half_big']:.2f}" for text in texts)]
        for name, losses in found.items()
    ]
    big = ["(all-big)", *(f"{next(iter(found.values()))[text]['all_big']:.2f}" for text in texts)]
    return grid(["variant", *texts], [*rows, big], numbers=range(1, len(texts) + 1))


def main() -> None:
    """Make all variants, write the JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--other", required=True, help="a text on which no network learns")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=76_800, help="of `distil`, and of `regress`")
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), help="names of variants")
    parser.add_argument("--folder", type=Path, default=Path("runs/recipes"), help="keeps what is done, to go on")
    parser.add_argument("--out", type=Path, default=Path("runs/recipes.json"))
    options = parser.parse_args()
    place = options.folder / f"{Path(options.model).name}-{options.tokens}"
    bench = Bench(options.model, options.other, options.tokens, options.device, place)
    found = {}
    for name in options.only:
        found[name] = bench.run(name)
        print(name, json.dumps(found[name]), flush=True)
    record(options.out, rows=found)
    print(markdown(found))


if __name__ == "__main__":
    main()
