"""The command line: `duorl train | compare | evaluate | ...`; `train.py` is `duorl train`.

Every option is typed, has the same name in YAML (`--config FILE`) and as a flag, and is explained by `--help`.

    commands                                       one line for each command
    learners, options, paper_options -> parser     options and their parser
    console, workbench, comparing, trainings       code that several commands use
    train, compare, evaluate, oracle, paper, dense, pretrain, report     one module for each command
    running                                        parses, checks and runs a command

Large libraries are imported only if a command needs them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from duorl.cli.commands import COMMANDS, chosen

__all__ = ["COMMANDS", "main", "train_main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command. Bad input ends with one line on standard error and exit code 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = chosen(words)
    from duorl.cli.running import run_command  # imported here, because --help and --version do not need it

    run_command(name, words[1:])


def train_main() -> None:
    """`python train.py ...` is `duorl train ...`."""
    main(["train", *sys.argv[1:]])
