"""The command line: `duorl train | compare | evaluate | ...`; `train.py` is `duorl train`.

Every option is typed, has the same name in YAML (`--config FILE`) and as a flag, and is explained by `--help`.

    commands                                       a line for each command
    learners, options, paper_options -> parser     what can be typed
    console, workbench, comparing, trainings       what commands share
    train, compare, evaluate, oracle, paper, dense, pretrain, report     what is done
    running                                        from the one to the other

Nothing heavy is imported before it is known what for.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from duorl.cli.commands import COMMANDS, chosen

__all__ = ["COMMANDS", "main", "train_main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; bad input ends in one line on standard error and exit code 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = chosen(words)
    from duorl.cli.running import run_command  # here: --help and --version are answered without it

    run_command(name, words[1:])


def train_main() -> None:
    """`python train.py ...` is `duorl train ...`."""
    main(["train", *sys.argv[1:]])
