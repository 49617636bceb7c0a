"""The table of commands, and the answers to --help and --version."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

from duorl.version import VERSION


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
        "duorl.cli.options:RunOptions",
        "duorl.cli.train",
        (*_ROUTES, "ranks", "quick"),
    ),
    "compare": Command(
        "Train several learners with several seeds, and compare their routers.",
        "duorl.cli.options:RunOptions",
        "duorl.cli.compare",
        (*_ROUTES, "quick"),
    ),
    "evaluate": Command(
        "Measure one saved router on held-out text, beside the best fixed pattern and the oracle.",
        "duorl.cli.options:EvaluateOptions",
        "duorl.cli.evaluate",
        ("overwrite", "map", "quick"),
    ),
    "generate": Command(
        "Generate a text with a router, and show the compute of each token.",
        "duorl.cli.options:GenerateOptions",
        "duorl.cli.generate",
        ("map",),
    ),
    "oracle": Command(
        "Search the best routes of held-out tokens and print the loss per number of big layers.",
        "duorl.cli.options:OracleOptions",
        "duorl.cli.oracle",
        _ROUTES,
    ),
    "label": Command(
        "Search the routes of router text once, for learners that learn from labels.",
        "duorl.cli.options:LabelOptions",
        "duorl.cli.label",
        _ROUTES,
    ),
    "paper": Command(
        "Repeat the study of Duo-LLM on a duo model: every figure, and the paper's claims with measurements.",
        "duorl.cli.paper_options:PaperOptions",
        "duorl.cli.paper",
        (*_ROUTES, "quick"),
    ),
    "report": Command(
        "Write report.html, one page that needs no other file, for a run.",
        "duorl.cli.options:ReportOptions",
        "duorl.cli.report",
        (),
    ),
    "dense": Command(
        "Train a duo model and dense models with the same FLOPs, and measure them on held-out text.",
        "duorl.paper.dense:DenseOptions",
        "duorl.cli.dense",
        (*_RESUMABLE, "trainer"),
    ),
    "convert": Command(
        "Make a duo model from a language model: its own networks become the big ones, small ones are made.",
        "duorl.smalls.recipe:ConvertOptions",
        "duorl.cli.convert",
        (*_RESUMABLE, "device", "whole", "ranks"),
    ),
    "pretrain": Command(
        "Stage 1: train a duo model under random routing.",
        "duorl.models.recipe:PretrainOptions",
        "duorl.cli.pretrain",
        (*_RESUMABLE, "trainer", "ranks"),
    ),
}


def chosen(words: Sequence[str]) -> str:
    """The command that was typed. --help and --version without a command are answered here.

    Raises:
        SystemExit: after `--help` or `--version`, or if there is no such command.
    """
    first = words[0] if words else ""
    if first in ("-h", "--help"):
        print(_help())
        raise SystemExit(0)
    if first == "--version":
        print(f"duorl {VERSION}")
        raise SystemExit(0)
    if first not in COMMANDS:
        near = difflib.get_close_matches(first, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(COMMANDS)}"
        fail(f"unknown command {first!r} ({hint})" if first else f"no command ({hint}; see --help)")
    return first


def _help() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = (f"  {name:<{width}}{command.summary}" for name, command in COMMANDS.items())
    return "\n".join(
        [
            "usage: duorl COMMAND [options]",
            "",
            "Reinforcement-learning routers for duo models.",
            "",
            "commands:",
            *lines,
            "",
            "duorl COMMAND --help explains a command's options; duorl --version says which release this is.",
        ]
    )


def in_words(error: BaseException) -> str:
    """What an error says to a user: its words, and its class where they alone say little."""
    if isinstance(error, OSError) and error.strerror is not None:  # of the operating system, with a number
        return error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"
    return str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"


def fail(line: str, code: int = 2) -> NoReturn:
    """Print one line on standard error and exit; code 2 means bad input."""
    if os.environ.get("RANK", "0") == "0":  # of several ranks one says it
        print(f"duorl: error: {' '.join(line.split())}", file=sys.stderr)
    raise SystemExit(code)
