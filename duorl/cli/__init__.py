"""The command line: `duorl train | compare | evaluate | ...`; `train.py` is `duorl train`.

Every option is typed, has the same name in YAML (`--config FILE`) and as a flag, and is explained by `--help`.

    options -> parser                  what can be typed
    folders, workbench -> train, compare, paper, commands      what is done
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

import transformers
from jsonargparse import Namespace

from duorl.allocator import keep_freed_memory
from duorl.cli.commands import dense_command, evaluate_command, oracle_command, pretrain_command, report_command
from duorl.cli.compare import Compare
from duorl.cli.paper import Paper
from duorl.cli.parser import build_parser, fail, parse
from duorl.cli.train import Train

__all__ = ["COMMANDS", "build_parser", "main", "train_main"]

# What preparing a command may raise for its input; running it is outside, where an error is a bug and keeps its trace.
_BAD_INPUT = (ValueError, OSError, KeyError, TypeError, AssertionError, ZeroDivisionError, RuntimeError)

COMMANDS: dict[str, Callable[[Namespace, str], Callable[[], None]]] = {
    "train": Train,
    "compare": Compare,
    "evaluate": evaluate_command,
    "oracle": oracle_command,
    "paper": Paper,
    "report": report_command,
    "dense": dense_command,
    "pretrain": pretrain_command,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; bad input ends in one line on standard error and exit code 2."""
    keep_freed_memory()
    sys.path.insert(0, os.getcwd())  # a reward named by import path may lie where the user stands
    transformers.logging.disable_progress_bar()
    try:
        name, options, text = parse(arguments)
        command = COMMANDS[name](options, text)
    except _BAD_INPUT as error:
        fail(" ".join(f"{type(error).__name__}: {error}".removeprefix("ValueError: ").split()))
    command()


def train_main() -> None:
    """`python train.py ...` is `duorl train ...`."""
    main(["train", *sys.argv[1:]])
