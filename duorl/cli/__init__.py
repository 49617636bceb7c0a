"""The command line: `duorl train | compare | evaluate | ...`; `train.py` is `duorl train`.

Every option is typed, has the same name in YAML (`--config FILE`) and as a flag, and is explained by `--help`.

    commands             which command was typed
    parser               options from words
    console              the terminal
    generate, report     the commands that are no experiments
    running              parses, checks and runs a command; the others are `duorl.experiments`

Large libraries are imported only if a command needs them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from duorl.checks import in_words
from duorl.cli.commands import COMMANDS, chosen, fail
from duorl.files import is_no_room

__all__ = ["COMMANDS", "main", "train_main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command. Bad input ends with one line on standard error and exit code 2.

    Raises:
        SystemExit: 1 if nobody reads the output any more; else see `duorl.cli.running.run_command`.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):  # a terminal without a character shows a question mark
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="replace")
    failed = True
    try:
        name = chosen(words)
        from duorl.cli.running import run_command  # imported here, because --help and --version do not need it

        run_command(name, words[1:])
        failed = False
    except BrokenPipeError:  # who read the output has read enough: `duorl ... | head`
        raise SystemExit(1) from None
    except OSError as error:
        if not is_no_room(error):
            raise
        fail(f"cannot write the output: {in_words(error)}", code=1)
    except SystemExit as ended:
        failed = bool(ended.code)
        raise
    finally:
        _flush(failed)


def _flush(failed: bool) -> None:
    """Write what is left of the output. If that fails, nothing more is written: Python would complain when it exits.

    Raises:
        SystemExit: 1, with a line, if a command that has not failed cannot write its output.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not failed:
            fail(f"cannot write the output: {in_words(error)}", code=1)


def train_main() -> None:
    """`python train.py ...` is `duorl train ...`."""
    main(["train", *sys.argv[1:]])
