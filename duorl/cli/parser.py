"""The parser of one command, built from its typed options."""

from __future__ import annotations

import difflib
import inspect
import re
from argparse import RawDescriptionHelpFormatter
from collections.abc import Collection, Sequence
from importlib import import_module
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, lazy_instance

from duorl.cli.commands import COMMANDS, fail
from duorl.cli.learners import LEARNERS, LearnerFactory, make_known, named

_COMPARE_ONLY = ("agents", "seeds", "processes", "targets", "knowable")
_TRAIN_ONLY = ("target_compute",)
_FLAGS = {
    "overwrite": "replace the run in the output folder",
    "resume": "continue the run in the output folder",
    "quick": "few windows, short trainings, Fig. 8 on small models: takes minutes, results are noisy",
}


class _HelpFormatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Does not wrap the lines in the section about rewards."""


class _Parser(ArgumentParser):
    """Errors in one line, with the nearest valid name, and exit code 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # type: ignore[override]
        """Print one line and exit."""
        line = " ".join(str(message).split()).replace('Parser key "', 'option "')
        unknown = re.search(r"(?:unrecognized arguments: --|ption ')([\w.]+)", line)
        if unknown:
            names = sorted({name.lstrip("-") for name in self._option_string_actions})
            near = difflib.get_close_matches(unknown[1], names, n=1, cutoff=0.4)
            line += f" (did you mean {near[0]}?)" if near else " (see --help)"
        if re.search(r'option "(agent|agents|rivals)"', line):
            line += f" (choose from {', '.join(LEARNERS)}, or give an import path)"
        fail(line)


def build_parser(name: str, without: Collection[str] = ()) -> _Parser:
    """The parser of a command.

    Args:
        name: name of the command.
        without: the options among `agent` and `reward` that get no default.
    """
    command = COMMANDS[name]
    parser = _Parser(
        prog=f"duorl {name}", description=command.summary, allow_abbrev=False, formatter_class=_HelpFormatter
    )
    module, _, options = command.options.partition(":")
    kind = getattr(import_module(module), options)
    if name == "report":
        parser.add_argument("run", type=str, help="folder of a comparison or of a paper run")
        return parser
    parser.add_argument("--config", action="config", help="YAML file with the options below")
    parser.add_class_arguments(kind, skip=set({"train": _COMPARE_ONLY, "compare": _TRAIN_ONLY}.get(name, ())))
    for flag in command.flags:
        parser.add_argument(f"--{flag}", action="store_true", help=_FLAGS[flag])
    if name in ("train", "compare"):
        _add_defaults(parser, name, without)
    return parser


def _add_defaults(parser: _Parser, name: str, without: Collection[str]) -> None:
    from duorl.cli.options import DEFAULT_PRICE
    from duorl.rewards import LossImprovement

    parser.epilog = _rewards_section()
    parser.set_defaults(
        {"reward": None if "reward" in without else lazy_instance(LossImprovement, price=DEFAULT_PRICE)}
    )
    if name == "train":
        learners = f"the learner, {', '.join(LEARNERS)}, or an import path"
        default = None if "agent" in without else named("PPO")
        parser.add_argument("--agent", type=LearnerFactory, default=default, help=learners)


def _rewards_section() -> str:
    """The section about rewards in --help, from the docstrings of the classes."""
    from duorl import rewards

    lines = ["rewards:", "  The reward of one decision; Sum adds several rewards. See docs/rewards.md.", ""]
    for name, kind in inspect.getmembers(rewards, inspect.isclass):
        if issubclass(kind, rewards.Reward) and kind not in (rewards.Reward, rewards.FunctionReward):
            given = inspect.signature(kind).parameters.values()
            options = (p.name if p.default is p.empty else f"{p.name}={p.default}" for p in given)
            lines += [f"  {name}({', '.join(options)})", f"      {(inspect.getdoc(kind) or '').splitlines()[0]}"]
    return "\n".join([*lines, *_OWN_REWARDS])


_OWN_REWARDS = (
    "",
    "  Your own reward is a class with __call__(self, step) -> (N,), or a function of a step, by its import path:",
    "      --reward thrifty.Thrifty --reward.bonus 0.02",
    "  There are examples in examples/. --reward.help CLASS lists the options of a class.",
)


def parse(name: str, words: Sequence[str]) -> tuple[Namespace, str]:
    """Parse the words after the command: options with their classes made, and the same options as YAML.

    Raises:
        SystemExit: the words cannot be parsed; one line on standard error, exit code 2.
        ValueError, TypeError, ...: a class refuses its arguments.
    """
    make_known(words)
    parser = build_parser(name)
    parsed = parser.parse_args(list(words))
    # The parser would keep the default class's options for another class, e.g. PPO's learning rate for REINFORCE.
    if replaced := _replaced(parsed, parser.get_defaults()):
        parser = build_parser(name, without=replaced)
        parsed = parser.parse_args(list(words))
    text = parser.dump(parsed, skip_unset=False)
    return parser.instantiate(parsed), text


def _replaced(parsed: Namespace, defaults: Namespace) -> list[str]:
    """Which of agent and reward have another class than the default."""
    both = [key for key in ("agent", "reward") if parsed.get(key) and defaults.get(key)]
    return [key for key in both if _class_path(parsed[key]) != _class_path(defaults[key])]


def _class_path(value: Any) -> str:
    return value if isinstance(value, str) else str(getattr(value, "class_path", value))


def read_config(text: str) -> dict[str, Any]:
    """The complete options as plain values."""
    return yaml.safe_load(text) or {}
