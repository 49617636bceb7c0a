"""Tables and pictures of a comparison: loss against compute, and where the big networks are used."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text
from torch import Tensor

from duorl.costs import ACTIONS, BIG
from duorl.evaluation import Comparison
from duorl.evaluation.bound import ROWS
from duorl.markdown import grid
from duorl.paper.measures import LOWER_BOUND
from duorl.paper.pictures import around, layers_axis


def frontier(comparison: Comparison) -> Figure:
    """Loss against compute: every router with its 95 % interval, the fixed frontier, and the oracle's if known."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    for name, label, style, color in (
        ("fixed", "best fixed pattern per budget (routed)", "o-", "0.55"),
        ("oracle", f"oracle per budget (reference, {_searched(comparison):,} of the tokens)", "s--", "0.75"),
    ):
        if points := comparison.frontiers[name]:
            xs, ys = [point["compute"] for point in points], [point["loss"] for point in points]
            axes.plot(xs, ys, style, color=color, label=label, markersize=4, zorder=1)
    limit = max(point["loss"] for point in comparison.frontiers["fixed"]) + 0.15
    off = [row["router"] for row in comparison.rows if row["loss"] > limit]  # all-skip would make the rest too small
    rivals = [row for row in comparison.rows if row["loss"] <= limit and not row["sees_label"]]
    for place, row in enumerate(rivals):
        low, high = around(row, "loss", "loss_minus_fixed")
        spread = [[max(0.0, row["loss"] - low)], [max(0.0, high - row["loss"])]]
        mark = "D" if place < 10 else "s"  # ten colours, then again
        axes.errorbar(row["compute"], row["loss"], yerr=spread, fmt=mark, label=called(row["router"]), capsize=3)
    axes.set_xlabel("compute (FFN FLOPs / all-big)")
    axes.set_ylabel("loss (nats per token)")
    titles = ["Held-out loss; bars: 95 % interval of the paired difference to best fixed", BOUNDS[bound_of(comparison)]]
    axes.set_title("\n".join(filter(None, titles)), fontsize=9)
    title = "above the picture:\n" + "\n".join(off) if off else None
    axes.legend(fontsize=8, title=title, title_fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    axes.grid(alpha=0.2)
    return figure


BOUNDS = {
    "exact": "",
    "lower bound": "No oracle: the bound is coordinate descent, a lower bound of the oracle's return.",
    None: "No oracle, and no bound in its place.",
}
"""Sentence in pictures and pages if there is no oracle."""


def called(router: str) -> str:
    """The name of a row in figures and reports; that of a bound in full, for which a terminal has no room."""
    return LOWER_BOUND if router == ROWS["descent"] else router


def bound_of(comparison: Comparison) -> str | None:
    """The bound of regrets: `exact`, `lower bound` or None; in older files it is always exact."""
    return comparison.rows[0].get("bound", "exact") if comparison.rows else None


def _searched(comparison: Comparison) -> int:
    """Number of searched tokens."""
    return min((row["reference"]["tokens"] for row in comparison.rows if row["reference"]), default=0)


def heat_map(routes: Tensor, title: str) -> Figure:
    """Share of big per layer and position (Duo-LLM, Fig. 2 and 3): routes (W, T, L)."""
    share = (routes == BIG).float().mean(0).T.cpu()  # (L, T)
    figure = Figure(figsize=(8, max(2.5, 0.9 + 0.09 * len(share))), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(share, aspect="auto", origin="lower", vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    axes.set_xlabel("position in the window")
    layers_axis(axes)
    axes.set_title(title, fontsize=9)
    figure.colorbar(image, ax=axes, label="share of big")
    return figure


_HOLDS = "^"
HOLM = f"{_HOLDS} it is not 0, with 95 % confidence for all differences of the table together (Holm)."
"""What tables say of the differences that hold; not of older files, which do not know."""
_PAIRED = "In brackets the 95 % interval of the paired difference to best fixed."
MIXED = "Every router, the fixed patterns too, is the best mixture of two of its steps; router text decides which two."
"""What tables at equal compute compare."""


def _paired(value: float, interval: Sequence[float] | None, holds: bool, digits: int) -> str:
    number = f"{value:+.{digits}f}{_HOLDS if holds else ''}"
    return f"{number} ({interval[0]:+.{digits}f}, {interval[1]:+.{digits}f})" if interval else number


_COLUMNS = ["router", "loss", "compute", "actions %", "return", "minus best fixed", "regret", "agree"]
_SEES = " * sees the label: a bound, not a rival, on the searched tokens only, in the reference context."
_TERMINAL, _LEAST_NAME = 80, 12  # columns: of the terminal, and of a router's name


def table(comparison: Comparison) -> Table:
    """The comparison as a table for a terminal of at least 80 columns; the caption names the context of each column.

    Names are shortened if there is no room for them; numbers are not.
    """
    shown = Table(title=_title(comparison), caption=_caption(comparison), box=SIMPLE_HEAD, padding=0, pad_edge=False)
    titles, rows = _titles(comparison), [_cells(row) for row in comparison.rows]
    widths = _widths(titles, rows)
    if sum(widths[1:]) + len(widths) - 1 + _LEAST_NAME > _TERMINAL:  # then the interval is below its number
        rows = [[cell.replace(" (", "\n(") for cell in row] for row in rows]
        widths = _widths(titles, rows)
    shown.add_column(titles[0], min_width=_LEAST_NAME)
    for name, width in zip(titles[1:], widths[1:], strict=True):
        shown.add_column(name, justify="right", width=width)
    for name, *numbers in rows:
        shown.add_row(Text(name, no_wrap=True, overflow="ellipsis"), *(Text(cell, no_wrap=True) for cell in numbers))
    return shown


def _widths(titles: list[str], rows: list[list[str]]) -> list[int]:
    """Width of each column: its longest line, with titles broken between words."""
    columns = zip(*([title.replace(" ", "\n") for title in titles], *rows), strict=True)
    return [max(len(line) for cell in column for line in cell.split("\n")) for column in columns]


def _title(comparison: Comparison) -> str:
    return f"price {comparison.settings['price']:g} nats per all-big pass"


def _caption(comparison: Comparison) -> str:
    routed = max(row["tokens"] for row in comparison.rows)
    searched = f"; regret and agreement with {{}} in the reference context, {_searched(comparison):,} of them"
    against = {
        "exact": f"{searched.format('the oracle')}. ",
        "lower bound": f"{searched.format('coordinate descent')}, a lower bound of the oracle's return: regrets are at "
        "least so large. ",
        None: ". No bound was searched, so there is no regret and no agreement. ",
    }[bound_of(comparison)]
    sees = _SEES if any(row["sees_label"] for row in comparison.rows) else ""
    return (
        f"Actions: skip/small/big. Routed context, {routed:,} held-out tokens{against}"
        f"{_PAIRED}{_holm(comparison.rows, 'return_minus_fixed_holds')}{sees}{_rival(comparison)}"
    )


def _rival(comparison: Comparison) -> str:
    """How the best fixed pattern was chosen; not of older files."""
    rival = comparison.settings.get("rival", "")
    return f" {rival[0].upper()}{rival[1:]}." if rival else ""


def _titles(comparison: Comparison) -> list[str]:
    of_bound = {"regret": "regret (at least)", "agree": "agree with bound"}
    return [of_bound.get(name, name) if bound_of(comparison) == "lower bound" else name for name in _COLUMNS]


def markdown(comparison: Comparison) -> str:
    """The same table in Markdown, with the top-1 agreement."""
    bound = f"{ROWS['descent']}*"
    rows = [
        [f"{LOWER_BOUND}*" if cells[0] == bound else cells[0], *cells[1:]] for cells in map(_cells, comparison.rows)
    ]
    lines = [_titles(comparison), *rows]
    if all("top1_agreement" in row for row in comparison.rows):  # not in older files
        shares = ["top-1 agreement with all-big", *(_share(row, "top1_agreement") for row in comparison.rows)]
        lines = [[*cells[:-2], share, *cells[-2:]] for cells, share in zip(lines, shares, strict=True)]
    table = grid(lines[0], lines[1:], numbers=range(1, len(lines[0])))
    notes = _note(f"{_holm(comparison.rows, 'return_minus_fixed_holds')}{_rival(comparison)}")
    return "\n".join([table, *notes, *(f"{line}.\n" for line in transfer_lines(comparison))])


def transfer_lines(comparison: Comparison) -> list[str]:
    """Sentences: how a router was calibrated, and what it spends on the text that it learned on."""
    lines, settings = [], comparison.settings
    if found := settings.get("calibration"):
        where = f"the first {found['windows']} windows of the router split of {_listed(found['text'])}"
        how = f"shifts of the logits {found['shifts']}" if "shifts" in found else f"price {found['price']:.4g}"
        lines.append(
            f"calibrated to compute {found['target_compute']:g} on {where}, without labels: {how}, "
            f"compute there {found['compute']:.3f}"
        )
    for row in comparison.rows:
        if old := row.get("learned_on"):
            drift = _paired(old["drift"], old["drift_interval"], False, 3)
            lines.append(
                f"{row['router']} on {_listed(old['text'])}, which it learned on: loss {old['loss']:.3f}, compute "
                f"{old['compute']:.3f}; here: loss {row['loss']:.3f}, compute {row['compute']:.3f}, drift {drift}"
            )
    return lines


def _listed(texts: str | list[str]) -> str:
    return texts if isinstance(texts, str) else ", ".join(texts)


def _cells(row: dict) -> list[str]:
    holds = row.get("return_minus_fixed_holds", False)
    difference = _paired(row["return_minus_fixed"], row["return_minus_fixed_interval"], holds, 3)
    return [
        row["router"] + ("*" if row["sees_label"] else ""),
        f"{row['loss']:.3f}",
        f"{row['compute']:.2f}",
        "/".join(f"{100 * row['actions'][action]:.0f}" for action in ACTIONS),
        f"{row['return']:+.3f}",
        difference if row["router"] != "best fixed" else "",
        "" if row["regret"] is None else f"{row['regret']:.3f}",
        "" if row["agreement"] is None else f"{100 * row['agreement']:.0f} %",
    ]


def _share(row: dict, key: str) -> str:
    """A share with its interval, in percent; nothing if it is not measured."""
    if row.get(key) is None:
        return ""
    ends = [f"{100 * end:.1f}" for end in row[f"{key}_interval"] or ()]
    return f"{100 * row[key]:.1f} %" + (f" ({', '.join(ends)})" if ends else "")


def budget_table(rows: list[dict[str, float]], title: str) -> Table:
    """Losses of the oracle and of the best fixed route, per number of big layers (`RouteTable.by_budget`)."""
    shown = Table(title=title)
    for name in ("big layers", "oracle's loss", "compute", "best fixed route's loss", "its compute"):
        shown.add_column(name, justify="right")
    for row in rows:
        numbers = (row["loss"], row["compute"], row["fixed_loss"], row["fixed_compute"])
        shown.add_row(str(row["big"]), *(f"{number:.4f}" for number in numbers))
    return shown


def budget_frontiers(found: dict, text: str) -> Figure:
    """Frontiers of routers, and their paired differences to the best fixed pattern, with intervals.

    Dots are the steps of the ladders, and lines what mixing them reaches. The frontiers have no bands: files differ far
    more than routers do, so that all bands would cover each other.

    Args:
        found: one text of `budgets.json`.
        text: name of the text.
    """
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, router in enumerate(found["routers"]):
        color = "0.55" if router["router"] == _FIXED else f"C{index - 1}"
        steps = router["frontier"]
        xs, ys = [step["compute"] for step in steps], [step["loss"] for step in steps]
        left.plot(xs, ys, ".", color=color, markersize=3)
        left.plot(*zip(*router["mixed"], strict=True), "-", color=color, label=router["router"], linewidth=1)
        points = _below_fixed(found["rows"], router["router"])
        if points:
            targets, differences, bars = zip(*points, strict=True)
            shifted = [target + 0.006 * (index - len(found["routers"]) / 2) for target in targets]
            spread = list(zip(*bars, strict=True))
            right.errorbar(shifted, differences, yerr=spread, fmt="D", color=color, capsize=3, markersize=4)
    known = any(against["interval"] for row in found["rows"] for against in row["minus"].values())
    left.axhline(found["all_big"], color="0.8", linestyle="--", label="all-big")
    right.axhline(0, color="0.55")
    for axes, title in (
        (left, f"{text}: held-out loss, mean over seeds"),
        (right, "minus the best fixed pattern at equal compute" + (", 95 % intervals" if known else "")),
    ):
        axes.set_xlabel("compute (FFN FLOPs / all-big)")
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.2)
    left.set_ylabel("nats per token")
    left.legend(fontsize=8)
    return figure


_FIXED = "best fixed"


def _below_fixed(rows: list[dict], router: str) -> list[tuple[float, float, tuple[float, float]]]:
    """Per target that the router reaches: the target, the difference, and the bars below and above it."""
    points = []
    for row in rows:
        if row["router"] == router and (against := row["minus"].get(_FIXED)):
            low, high = against["interval"] or [against["difference"]] * 2
            points.append(
                (row["target"], against["difference"], (against["difference"] - low, high - against["difference"]))
            )
    return points


def budgets_markdown(numbers: dict) -> str:
    """The tables of `budgets.json`: per text, every router's loss at every target, and its difference to best fixed."""
    tables = [_budget_table(text, found) for text, found in numbers["texts"].items()]
    against = [row["minus"].get(_FIXED, {}) for found in numbers["texts"].values() for row in found["rows"]]
    notes = [f"{numbers['note']}\n"] if "note" in numbers else _note(f"{_holm(against, 'holds')} {MIXED}")
    return "\n".join([*tables, *notes])


def _holm(rows: list[dict], key: str) -> str:
    return f" {HOLM}" if any(key in row for row in rows) else ""


def _note(holm: str) -> list[str]:
    return [f"{_PAIRED}{holm}\n"] if holm else []


def _budget_table(text: str, found: dict) -> str:
    targets = sorted({row["target"] for row in found["rows"]})
    cells = {(row["router"], row["target"]): _budget_cell(row) for row in found["rows"]}
    head = ["router", "seeds", *(f"at {100 * target:g} %" for target in targets), "all-big's loss at", "hypervolume"]
    lines = []
    for router in found["routers"]:
        name = router["router"]
        losses = [cells[name, target] for target in targets]
        lines.append([name, str(router["seeds"]), *losses, level_cell(router), f"{router['hypervolume']:.4f}"])
    title = f"**{text}**, {found['tokens']:,} tokens, all-big {found['all_big']:.3f}\n"
    more = [*_agreement_and_speed(found["rows"], targets), *_transfer(found.get("transfer"), targets)]
    return "\n".join([title, grid(head, lines), *more])


def level_cell(router: dict) -> str:
    """Where a frontier reaches all-big's loss, with the interval of the compute."""
    level, interval = router["level_at"], router.get("level_at_interval")
    known = "never" if level is None else f"{100 * level:.0f} %"
    if not interval or interval[0] is None or interval[0] == interval[1]:
        return known
    end = "no end" if interval[1] is None else f"{100 * interval[1]:.0f}"
    return f"{known} ({100 * interval[0]:.0f} to {end})"


def _agreement_and_speed(rows: list[dict], targets: list[float]) -> list[str]:
    """A table with top-1 agreement, all FLOPs and speed at each target; none if they are not measured."""
    if not any(row.get("top1_agreement") for row in rows):  # not in older files
        return []
    cells = {}
    for row in rows:
        parts = [_share(row, "top1_agreement")]
        if row["flops_share"] is not None:
            parts.append(f"{100 * row['flops_share']:.0f} % of all FLOPs, {row['tokens_per_second']:,.0f} tokens/s")
        cells[row["router"], row["target"]] = ", ".join(filter(None, parts))
    head = ["top-1 agreement with all-big", *(f"at {100 * target:g} %" for target in targets)]
    return [grid(head, _by_router(cells, targets))]


def _by_router(cells: dict[tuple[str, float], str], targets: list[float]) -> list[list[str]]:
    """A line per router: its name, and its cells at each target."""
    return [[name, *(cells[name, target] for target in targets)] for name in dict.fromkeys(name for name, _ in cells)]


def transfer_cell(row: dict) -> str:
    """What a router spends and loses, by the calibration on the text that it learned on, and on this one."""
    said = []
    for key, name in (("as_learned", "as learned"), ("calibrated", "calibrated here")):
        found = row[key]
        said.append(f"{name}: " + ("out of reach" if not found else f"{found['loss']:.3f} at {found['compute']:.3f}"))
    return "; ".join(said)


def _transfer(found: dict | None, targets: list[float]) -> list[str]:
    """A table with loss and compute on a text that routers did not learn on; none for other texts."""
    if not found or found["learned"]:
        return []
    cells = {(row["router"], row["target"]): transfer_cell(row) for row in found["rows"]}
    head = ["not learned on: loss at compute", *(f"for {100 * target:g} %" for target in targets)]
    return [grid(head, _by_router(cells, targets))]


def _budget_cell(row: dict) -> str:
    if row["loss"] is None:
        return f"spends {row['spends'][0]:.2f} to {row['spends'][1]:.2f}"
    against = row["minus"].get(_FIXED)
    if against is None:
        return f"{row['loss']:.4f}"
    return f"{row['loss']:.4f}, {_paired(against['difference'], against['interval'], against.get('holds', False), 4)}"
