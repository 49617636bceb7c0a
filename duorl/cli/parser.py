"""The parser of the whole command line, built from the typed options."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Collection, Sequence
from typing import NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, lazy_instance

import agents
from agents import PPO
from duorl import rewards
from duorl.cli.options import (
    DEFAULT_PRICE,
    AgentFactory,
    EvaluateOptions,
    OracleOptions,
    PaperOptions,
    RunOptions,
)
from duorl.dense import DenseOptions
from duorl.models.pretrain import PretrainOptions
from duorl.rewards import LossImprovement

LEARNERS = [name for name in agents.__all__ if name != "Agent" and not name.endswith("Agent")]
_COMPARE_ONLY = ("agents", "own_env", "seeds", "processes", "targets", "knowable")
_TRAIN_ONLY = ("target_compute",)


class _Parser(ArgumentParser):
    """Errors in one line, with the nearest valid name, and exit code 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # type: ignore[override]
        """Print one line and exit."""
        line = " ".join(str(message).split()).replace('Parser key "', 'option "')
        unknown = re.search(r"(?:unrecognized arguments: --|ption ')([\w.]+)", line)
        if unknown:
            near = difflib.get_close_matches(unknown[1], self._names(), n=1, cutoff=0.4)
            line += f" (did you mean {near[0]}?)" if near else " (see --help)"
        if 'option "agent"' in line:
            line += f" (choose from {', '.join(LEARNERS)}, or give an import path)"
        fail(line)

    def _names(self) -> list[str]:
        """Names of all options, those of the subcommands too."""
        parsers = [self, *(self._subcommands_action.choices.values() if self._subcommands_action else [])]
        return sorted({name.lstrip("-") for parser in parsers for name in parser._option_string_actions})


def fail(line: str) -> NoReturn:
    """One line on standard error, exit code 2."""
    print(f"duorl: error: {line}", file=sys.stderr)
    raise SystemExit(2)


class _HelpFormatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Leaves the lines of the rewards' section as they are."""


def _rewards_section() -> str:
    """What there is to name after --reward, from the classes themselves."""
    lines = ["rewards:", "  What a decision earns; a Sum adds several up. Explained in docs/rewards.md.", ""]
    for name, kind in inspect.getmembers(rewards, inspect.isclass):
        if issubclass(kind, rewards.Reward) and kind is not rewards.Reward:
            given = inspect.signature(kind).parameters.values()
            options = (p.name if p.default is p.empty else f"{p.name}={p.default}" for p in given)
            lines += [f"  {name}({', '.join(options)})", f"      {(inspect.getdoc(kind) or '').splitlines()[0]}"]
    return "\n".join([*lines, *_OWN_REWARDS])


_OWN_REWARDS = (
    "",
    "  Your own is a class with __call__(self, step) -> (N,) rewards, named by its import path:",
    "      --reward thrifty.Thrifty --reward.bonus 0.02",
    "  Three worked examples are in examples/; --reward.help CLASS lists a class's options.",
)


def _subparser(options: type, skip: set[str] | None = None) -> _Parser:
    summary = (options.__doc__ or "").split("\n")[0]
    parser = _Parser(description=summary, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with the options below")
    parser.add_class_arguments(options, skip=skip)
    parser.add_argument("--overwrite", action="store_true", help="replace a run that the output folder holds")
    return parser


def _report_parser() -> _Parser:
    parser = _Parser(description="Write report.html, one self-contained page, for a run.", allow_abbrev=False)
    parser.add_argument("run", type=str, help="folder of a comparison or of a paper run")
    return parser


def build_parser(without: Collection[str] = ()) -> tuple[_Parser, dict[str, _Parser]]:
    """The whole command line, and its subcommands' parsers by name.

    Args:
        without: `agent`, `reward`: those that get no default.
    """
    subparsers = {
        "train": _subparser(RunOptions, skip=set(_COMPARE_ONLY)),
        "compare": _subparser(RunOptions, skip=set(_TRAIN_ONLY)),
        "evaluate": _subparser(EvaluateOptions),
        "oracle": _subparser(OracleOptions),
        "paper": _subparser(PaperOptions),
        "report": _report_parser(),
        "dense": _subparser(DenseOptions),
        "pretrain": _subparser(PretrainOptions),
    }
    agent = None if "agent" in without else PPO
    learners = f"the learner, {', '.join(LEARNERS)}, or an import path"
    subparsers["train"].add_argument("--agent", type=AgentFactory, default=agent, help=learners)
    reward = None if "reward" in without else lazy_instance(LossImprovement, price=DEFAULT_PRICE)
    for name in ("train", "compare"):
        subparsers[name].set_defaults({"reward": reward})
        subparsers[name].epilog = _rewards_section()
    for name in ("train", "compare", "dense", "pretrain"):
        subparsers[name].add_argument(
            "--resume", action="store_true", help="keep what the output folder has finished, do the rest"
        )
    subparsers["paper"].add_argument(
        "--quick",
        action="store_true",
        help="few windows, short trainings, Fig. 8 on small models: says little, in minutes",
    )
    parser = _Parser(
        prog="duorl",
        description="Reinforcement-learning routers for duo models.",
        allow_abbrev=False,
        formatter_class=_HelpFormatter,  # the commands' parsers take it over
    )
    commands = parser.add_subcommands()
    for name, subparser in subparsers.items():
        commands.add_subcommand(name, subparser, help=subparser.description)
    return parser, subparsers


def parse(arguments: Sequence[str] | None) -> tuple[str, Namespace, str]:
    """What was typed: the command's name, its options with their classes built, and the same as YAML.

    Raises:
        SystemExit: it cannot be parsed; one line on standard error, exit code 2.
        ValueError, TypeError, ...: a class refuses its arguments.
    """
    parser, subparsers = build_parser()
    parsed = parser.parse_args(arguments)
    name = parsed.subcommand
    # The parser carries a default class's options over to the class that replaces it, PPO's learning rate to REINFORCE.
    if replaced := _replaced(parsed[name], subparsers[name].get_defaults()):
        parser, subparsers = build_parser(without=replaced)
        parsed = parser.parse_args(arguments)
    text = subparsers[name].dump(parsed[name], skip_none=False)
    return name, parser.instantiate(parsed)[name], text


def _replaced(parsed: Namespace, defaults: Namespace) -> list[str]:
    """Which of agent and reward are of another class than the default's."""
    both = [key for key in ("agent", "reward") if parsed.get(key) and defaults.get(key)]
    return [key for key in both if parsed[key].class_path != defaults[key].class_path]
