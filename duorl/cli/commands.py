"""Which command was typed; the answers to --help and --version; and the line of an error."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from duorl.experiments.table import COMMANDS
from duorl.version import VERSION


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


def fail(line: str, code: int = 2) -> NoReturn:
    """Print one line on standard error and exit; code 2 means bad input."""
    if os.environ.get("RANK", "0") == "0":  # of several ranks one says it
        print(f"duorl: error: {' '.join(line.split())}", file=sys.stderr)
    raise SystemExit(code)
