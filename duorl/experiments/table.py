"""The table of experiments, which are also the commands: their options, and where they are."""

from __future__ import annotations

from typing import NamedTuple


class Command(NamedTuple):
    """One command.

    Attributes:
        summary: description in one line.
        options: its options, `module:Class`.
        module: its module, which has `prepare(options, config)`.
        flags: further flags: `resume`, `overwrite`, `quick`, `whole`; `device`, `map` and `trainer`, see
            `DeviceOptions`, `MapOptions` and `TrainerDeviceOptions` of `duorl.devices`; `ranks`: several processes can
            share its work (`duorl.ranks`).
    """

    summary: str
    options: str
    module: str
    flags: tuple[str, ...] = ("overwrite",)


_RESUMABLE = ("overwrite", "resume")
_ROUTES = (*_RESUMABLE, "map")
COMMANDS = {
    "train": Command(
        "Train a router, and compare it on held-out text with the oracle and other routers.",
        "duorl.experiments.options:RunOptions",
        "duorl.experiments.train",
        (*_ROUTES, "ranks", "quick"),
    ),
    "compare": Command(
        "Train several learners with several seeds, and compare their routers.",
        "duorl.experiments.options:RunOptions",
        "duorl.experiments.compare",
        (*_ROUTES, "quick"),
    ),
    "evaluate": Command(
        "Measure one saved router on held-out text, beside the best fixed pattern and the oracle.",
        "duorl.experiments.options:EvaluateOptions",
        "duorl.experiments.evaluate",
        ("overwrite", "map", "quick"),
    ),
    "generate": Command(
        "Generate a text with a router, and show the compute of each token.",
        "duorl.experiments.options:GenerateOptions",
        "duorl.cli.generate",
        ("map",),
    ),
    "oracle": Command(
        "Search the best routes of held-out tokens and print the loss per number of big layers.",
        "duorl.experiments.options:OracleOptions",
        "duorl.experiments.oracle",
        _ROUTES,
    ),
    "label": Command(
        "Search the routes of router text once, for learners that learn from labels.",
        "duorl.experiments.options:LabelOptions",
        "duorl.experiments.label",
        _ROUTES,
    ),
    "paper": Command(
        "Repeat the study of Duo-LLM on a duo model: every figure, and the paper's claims with measurements.",
        "duorl.experiments.paper_options:PaperOptions",
        "duorl.experiments.paper",
        (*_ROUTES, "quick"),
    ),
    "report": Command(
        "Write report.html, one page that needs no other file, for a run.",
        "duorl.experiments.options:ReportOptions",
        "duorl.cli.report",
        (),
    ),
    "dense": Command(
        "Train a duo model and dense models with the same FLOPs, and measure them on held-out text.",
        "duorl.paper.dense:DenseOptions",
        "duorl.experiments.dense",
        (*_RESUMABLE, "trainer"),
    ),
    "convert": Command(
        "Make a duo model from a language model: its own networks become the big ones, small ones are made.",
        "duorl.smalls.recipe:ConvertOptions",
        "duorl.experiments.convert",
        (*_RESUMABLE, "device", "whole", "ranks"),
    ),
    "pretrain": Command(
        "Stage 1: train a duo model under random routing.",
        "duorl.models.recipe:PretrainOptions",
        "duorl.experiments.pretrain",
        (*_RESUMABLE, "trainer", "ranks"),
    ),
}
