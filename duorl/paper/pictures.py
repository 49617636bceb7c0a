"""The figures of the paper, drawn from the numbers of `duorl.paper.study` and `duorl.paper.dense`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from duorl.colours import ink, of_loss
from duorl.costs import ACTIONS
from duorl.files import write_json, writing
from duorl.paper.measures import name_of

Numbers = dict[str, Any]
_ACTION_COLORS = ListedColormap(["0.92", "tab:blue", "tab:orange"])
_LINE_TOKENS = 64  # tokens of Fig. 5's window that are labelled


def draw(figures: Mapping[str, Numbers], folder: Path) -> None:
    """Write `figure-NAME.png` and `figure-NAME.json` for every figure.

    Args:
        figures: numbers by the figure's name: `2a` ... `8c`.
        folder: an existing folder.
    """
    for name, numbers in figures.items():
        write_json(folder / f"figure-{name}.json", numbers)
        picture = _DRAWN_BY[name](numbers)
        picture.suptitle(f"Duo-LLM, figure {name}", fontsize=9, x=0.01, ha="left", color="0.4")
        with writing(folder / f"figure-{name}.png") as beside:
            picture.savefig(beside, dpi=110)
        plt.close(picture)


def _panels(names: Sequence[str], size: tuple[float, float], *, below: bool = False) -> tuple[Figure, list[Axes]]:
    shape = (len(names), 1) if below else (1, len(names))
    figure, axes = plt.subplots(*shape, figsize=size, layout="constrained", squeeze=False)
    for axis, name in zip(axes.flat, names, strict=True):
        axis.set_title(name, fontsize=9)
    return figure, list(axes.flat)


def layers_axis(axis: Axes) -> None:
    """Name the layers on the y axis, by whole numbers."""
    axis.set_ylabel("layer")
    axis.yaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def _height(numbers: Numbers, least: float) -> float:
    """Inches of a panel with all layers."""
    return max(least, 0.7 + 0.09 * numbers["layers"])


def _heat_maps(numbers: Numbers) -> Figure:
    height = _height(numbers, 2.25) * len(numbers["texts"])
    figure, axes = _panels(list(numbers["texts"]), (9, height), below=True)
    for axis, text in zip(axes, numbers["texts"].values(), strict=True):
        image = axis.imshow(
            text["share_of_big"], aspect="auto", origin="lower", vmin=0, vmax=1, cmap="viridis", interpolation="nearest"
        )
        layers_axis(axis)
    axes[-1].set_xlabel(
        f"position; {numbers['router']}, {numbers['big']} of {numbers['layers']} big, {numbers['context']} context"
    )
    figure.colorbar(image, ax=axes, label="share of big")
    return figure


def _random_patterns(numbers: Numbers) -> Figure:
    figure, axes = _panels(list(numbers["texts"]), (9, 3.6))
    for axis, text in zip(axes, numbers["texts"].values(), strict=True):
        axis.hist(text["patterns"], bins=12, color="tab:blue", alpha=0.5, label="random patterns, each for all tokens")
        for key, color in (
            ("oracle", "black"),
            ("best_random", "0.5"),
            ("best_fixed", "tab:green"),
            ("soft", "tab:red"),
        ):
            axis.axvline(text[key]["mean"], color=color, label=name_of(key, numbers).replace("_", " "))
        axis.set_xlabel(f"loss (nats), {numbers['big']} of {numbers['layers']} big, reference context")
    axes[0].legend(fontsize=7)
    return figure


_STYLES = {"oracle": "k-s", "fixed": "-o", "soft": "-D"}
_LABELS = {"fixed": "best fixed pattern", "soft": "soft router (the paper's)"}


def _curves(numbers: Numbers) -> Figure:
    panels = [(text, context) for text in numbers["texts"] for context in ("reference", "routed")]
    figure, axes = plt.subplots(len(numbers["texts"]), 2, figsize=(10, 7), layout="constrained", squeeze=False)
    for axis, (text, context) in zip(axes.flat, panels, strict=True):
        axis.set_title(f"{text}, {context} context", fontsize=9)
        for kind, points in numbers["texts"][text][context].items():
            points = sorted(points, key=lambda point: point["compute"])
            paired = [p | {"loss_interval": around(p, "loss", "minus_all_big")} for p in points]
            label = _LABELS.get(kind, name_of(kind, numbers))
            line(axis, [p["compute"] for p in points], paired, "loss", _STYLES.get(kind, "-^"), label)
        axis.set_xlabel("compute (FFN FLOPs / all-big); bands: paired difference to all-big")
        axis.set_ylabel("loss (nats)")
        axis.grid(alpha=0.2)
    axes[0, 0].legend(fontsize=7)  # this context has all curves
    return figure


def around(point: Numbers, value: str, difference: str) -> list[float]:
    """The interval of a paired difference, shifted to its value; without an interval, the value alone."""
    interval = point[f"{difference}_interval"] or [point[difference]] * 2
    return [point[value] + bound - point[difference] for bound in interval]


def line(axis: Axes, xs: Sequence[float], points: Sequence[Numbers], key: str, style: str, label: str) -> None:
    """Draw means, with their intervals as a band."""
    drawn = axis.plot(xs, [point[key] for point in points], style, label=label, markersize=4)
    low, high = zip(*(point[f"{key}_interval"] for point in points), strict=True)
    axis.fill_between(xs, low, high, alpha=0.12, lw=0, color=drawn[0].get_color())


def _schedules(numbers: Numbers) -> Figure:
    figure, axes = _panels(list(numbers["texts"]), (9, 3.6))
    for axis, text in zip(axes, numbers["texts"].values(), strict=True):
        for place, found in enumerate(text.values()):
            low, high = found["minus_constant_interval"]
            middle = found["minus_constant"]
            spread = [[max(0.0, middle - low)], [max(0.0, high - middle)]]
            axis.bar(place, middle, yerr=spread, capsize=4, color=f"C{place}")
        labels = [
            f"{kind}, {found['big'][0]} to {found['big'][-1]} big\nloss {found['loss']:.3f}"
            for kind, found in text.items()
        ]
        axis.set_xticks(range(len(text)), labels)
        axis.set_ylabel("loss minus constant budget (nats)")
    return figure


def _difficulty(numbers: Numbers) -> Figure:
    figure, axes = _panels(list(numbers["texts"]), (13, 6), below=True)
    for axis, text in zip(axes, numbers["texts"].values(), strict=True):
        tokens = text["tokens"][:_LINE_TOKENS]
        for key, style in (("all_small", "-"), ("all_big", "-"), ("oracle", "k-"), ("difficulty", "r:")):
            label = name_of(key, numbers).replace("_", "-")
            axis.plot([token[key] for token in tokens], style, label=label, lw=1.2)
        axis.set_xticks(range(len(tokens)), [shown(token["token"]) for token in tokens], rotation=90, fontsize=6)
        axis.set_ylabel("nats")
        axis.margins(x=0.01)
    axes[0].legend(fontsize=8, ncols=4)
    return figure


def shown(token: str) -> str:
    """A token as a label, with visible white space and without formulas for matplotlib."""
    return token.replace("\n", "\\n").replace(" ", "\u00b7").replace("$", "\\$")


def _coloured_text(numbers: Numbers) -> Figure:
    columns = (("all_small", "(a) loss under all-small"), ("difficulty", "(b) difficulty"))
    texts = numbers["texts"]
    figure, axes = plt.subplots(len(texts), 2, figsize=(13, 4.2 * len(texts)), layout="constrained", squeeze=False)
    for row, (name, tokens) in zip(axes, texts.items(), strict=True):
        for axis, (key, title) in zip(row, columns, strict=True):
            axis.set_title(f"{name}: {title}", fontsize=9)
            _write(axis, tokens, key)
    return figure


_COLUMNS_OF_TEXT, _LINES_OF_TEXT = 116, 30


def _write(axis: Axes, tokens: Sequence[Numbers], key: str) -> None:
    """Write text in monospace, each token on its colour, with the line breaks of the original."""
    axis.set(xlim=(0, _COLUMNS_OF_TEXT), ylim=(_LINES_OF_TEXT, 0))
    axis.axis("off")
    column, at = 0, 0.5
    for token in tokens:
        for index, part in enumerate(token["token"].split("\n")):
            if index or column + len(part) > _COLUMNS_OF_TEXT:
                column, at = 0, at + 1
            if at > _LINES_OF_TEXT:
                return
            if part:
                colour = of_loss(token[key])
                style: Numbers = {"family": "monospace", "fontsize": 6.2, "va": "center", "color": ink(colour)}
                box: Numbers = {"facecolor": colour, "lw": 0, "pad": 0.6}
                axis.text(column, at, part.replace("$", "\\$"), bbox=box, **style)
            column += len(part)


def _single_routes(numbers: Numbers) -> Figure:
    kinds = list(next(iter(numbers["texts"].values()))["routes"])
    figure, axes = plt.subplots(
        len(numbers["texts"]) * len(kinds),
        1,
        figsize=(12, _height(numbers, 2.0) * len(numbers["texts"]) * len(kinds)),
        layout="constrained",
    )
    norm = BoundaryNorm([-0.5, 0.5, 1.5, 2.5], 3)
    panels = [(name, kind) for name in numbers["texts"] for kind in kinds]
    for axis, (name, kind) in zip(axes, panels, strict=True):
        text = numbers["texts"][name]
        image = axis.imshow(text["routes"][kind], aspect="auto", origin="lower", cmap=_ACTION_COLORS, norm=norm)
        context = "reference" if kind == "oracle" else "routed"
        axis.set_title(f"{name}, {name_of(kind, numbers)}, {context} context", fontsize=9)
        layers_axis(axis)
        axis.set_xticks(range(len(text["tokens"])), [shown(token) for token in text["tokens"]], rotation=90, fontsize=6)
    bar = figure.colorbar(image, ax=axes, ticks=range(3), shrink=0.3)
    bar.ax.set_yticklabels(ACTIONS)
    return figure


def _scaling(numbers: Numbers) -> Figure:
    figure, axes = _panels(list(numbers["texts"]), (5 * len(numbers["texts"]), 4))
    for axis, models in zip(axes, numbers["texts"].values(), strict=True):
        for name, points in models.items():
            line(axis, [point["big_share"] for point in points], points, "accuracy", "-o", name)
        axis.set_xlabel("share of big (random routing); dense: the same FLOPs")
        axis.set_ylabel("accuracy of the next token")
        axis.grid(alpha=0.2)
        axis.legend(fontsize=8)
    return figure


_DRAWN_BY: dict[str, Callable[[Numbers], Figure]] = {
    **{f"{number}{letter}": _heat_maps for number in "23" for letter in "abcd"},
    "4a": _random_patterns,
    "4b": _curves,
    "4c": _schedules,
    "5": _difficulty,
    "6": _coloured_text,
    "7": _single_routes,
    **{f"8{letter}": _scaling for letter in "abc"},
}
