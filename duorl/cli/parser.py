"""The parser of one command, built from its typed options."""

from __future__ import annotations

import difflib
import inspect
import io
import re
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Collection, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, Union, get_args, get_origin

import torch
import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from duorl.cli.commands import COMMANDS, fail
from duorl.devices import pick_device, pick_dtype
from duorl.experiments.built import AGENT, condensed, fill, instantiated
from duorl.experiments.learners import LEARNERS, make_known, named, spelled, yaml_files
from duorl.extensions import find
from duorl.models.bases import find_base
from duorl.models.loading import price_of_model, width_of_model
from duorl.runs.folders import versions
from duorl.version import VERSION

_TYPE = re.compile(r"Expected an? <class '(\w+)'>\.? Got value:")
_CHOICES = re.compile(r"Expected an? typing\.Literal\[(.+?)\]\.? Got value:")
_FILES = (".yaml", ".yml", ".json")
_KINDS = {"float": "a number", "int": "a whole number", "bool": "true or false"}


class _HelpFormatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Does not wrap the lines in the section about rewards."""


class _Parser(ArgumentParser):
    """Errors in one line, with the nearest valid name, and exit code 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # type: ignore[override]
        """Print one line and exit."""
        line = " ".join(condensed(str(message)).split()).replace('Parser key "', 'option "')
        line = _TYPE.sub(lambda found: f"must be {_KINDS.get(found[1], found[1])}, not", line)
        line = _CHOICES.sub(lambda found: f"choose from {found[1].replace(chr(39), '')}, not", line)
        line = line.replace("Expected a dot import path string:", "there is no class")
        unknown = re.search(r"(?:unrecognized arguments: --|ption ')([\w.]+)", line)
        if unknown:
            near = self._near(unknown[1])
            line += f" (did you mean {near}?)" if near else " (see --help)"
        if re.search(r'option "(agent|agents|rivals)"', line):
            line += f" (choose from {', '.join(LEARNERS)}, or give an import path)"
        fail(line)

    def _near(self, unknown: str) -> str | None:
        """The option that was meant: one with this name in a group, or one that is written almost like it."""
        names = sorted({name.lstrip("-") for name in self._option_string_actions})
        within = [name for name in names if name.endswith(f".{unknown}")]
        within += self._within("reward", unknown, lambda: [find("duorl.rewards.LossImprovement")])
        near = within or difflib.get_close_matches(unknown, names, n=1, cutoff=0.6)
        return next(iter(near or self._within("agent", unknown, lambda: [named(name) for name in _imported()])), None)

    def _within(self, option: str, unknown: str, kinds: Callable[[], list[type]]) -> list[str]:
        """The option of a class that has this name; large packages are imported only to answer this."""
        if f"--{option}" not in self._option_string_actions:
            return []
        return [f"{option}.{unknown}" for kind in kinds() if unknown in inspect.signature(kind).parameters]


def _imported() -> list[str]:
    """The learners that are imported already, and the default one: those that a command line is about."""
    return [name for name, path in LEARNERS.items() if name == AGENT or path.rpartition(".")[0] in sys.modules]


def build_parser(name: str, without: Collection[str] = (), price: float | None = None, quick: bool = False) -> _Parser:
    """The parser of a command; see `duorl.experiments.built.fill` for the arguments."""
    parser = _Parser(
        prog=f"duorl {name}", description=COMMANDS[name].summary, allow_abbrev=False, formatter_class=_HelpFormatter
    )
    if name == "report":
        parser.add_argument("run", type=str, help="folder of a comparison or of a paper run")
        return parser
    if name in ("train", "compare"):
        parser.epilog = _rewards_section()
    fill(parser, name, without, price, quick)
    return parser


def _rewards_section() -> str:
    """The section about rewards in --help, from the docstrings of the classes."""
    from duorl import rewards

    lines = ["rewards:", "  The reward of one decision; Sum adds several rewards. See docs/reference/rewards.md.", ""]
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
        ValueError: a named class cannot be imported, or refuses its arguments, or the device is not there.
    """
    parser, parsed = _resolved(name, words)
    text = parser.dump(parsed, skip_unset=False)
    return instantiated(parser, parsed), text


def complete(name: str, path: Path) -> str:
    """The options in a run's configuration as YAML, with the defaults of the options that are newer than the run.

    Raises:
        ValueError: this version cannot read them; says why.
    """
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            parser, parsed = _resolved(name, ["--config", str(path)])
            return parser.dump(parsed, skip_unset=False)
    except (SystemExit, ValueError) as error:
        why = said.getvalue().strip().removeprefix("duorl: error: ") or str(error)
        origin = ", ".join(versions(path.parent)) or "before 0.3"
        raise ValueError(f"{path} is of DuoRL {origin}, and {VERSION} cannot read it: {why}") from error


def _resolved(name: str, words: Sequence[str]) -> tuple[_Parser, Namespace]:
    """The parser of a command and the options in its words; the device and the precision are those of this machine."""
    for path in yaml_files(words):
        _check_yaml(path)
    words = spelled(words)
    make_known(words)
    parser = build_parser(name)
    words = _as_lists(parser, words)
    parsed = parser.parse_args(list(words))
    # The parser would keep the default class's options for another class, e.g. PPO's learning rate for REINFORCE.
    replaced, price = _replaced(parsed, parser.get_defaults()), price_of_model(parsed.get("model") or "")
    quick = bool(parsed.get("quick"))
    if replaced or price is not None or quick:
        parser = build_parser(name, without=replaced, price=price, quick=quick)
        parsed = parser.parse_args(list(words))
    if "device" in parsed:
        device = pick_device(parsed.device)
        parsed.device = str(device)  # a run is resumed on the device and in the precision of its beginning
        trains = "trainer" in COMMANDS[name].flags
        if parsed.dtype == "auto" and not trains:  # a trainer's precision depends on options alone
            parsed.dtype = _precision(name, parsed.model, device)
    return parser, parsed


def _as_lists(parser: _Parser, words: Sequence[str]) -> list[str]:
    """The words with brackets around what is given for an option that takes a list alone: `--actions small,big`."""
    found, flag = [], ""
    for word in words:
        name, equals, value = word.partition("=") if word.startswith("--") else (flag, "", word)
        listed = value.startswith(("[", "{", "null")) or value.endswith(_FILES)
        if value and not listed and _takes_list(parser._option_string_actions.get(name)):
            word = f"{name}=[{value}]" if equals else f"[{value}]"
        found.append(word)
        flag = word if word.startswith("--") and "=" not in word else ""
    return found


def _takes_list(option: Any) -> bool:
    """Whether an option takes a list, and a text is nothing else for it."""
    hint = getattr(option, "_typehint", None)
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return str not in parts and any(get_origin(part) in (list, tuple) for part in parts)


def _precision(command: str, model: str, device: torch.device) -> str:
    """What the precision `auto` is for a model; still `auto` if it cannot be read, which is said when it is loaded."""
    try:
        width = find_base(model).config.hidden_size if command == "convert" else width_of_model(model)
    except (OSError, ValueError):
        return "auto"
    return str(pick_dtype("auto", device, width)).removeprefix("torch.")


def _check_yaml(path: Path) -> None:
    """Refuse a file of options that is not UTF-8, or names one option twice: the parser would take the last.

    Raises:
        ValueError: says where.
    """
    try:
        root = yaml.compose(path.read_bytes().decode("utf-8-sig"), Loader=yaml.CSafeLoader)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if id(node) in seen or not isinstance(node, yaml.CollectionNode):
            continue
        seen.add(id(node))
        parts = node.value
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in parts if isinstance(key, yaml.ScalarNode)]
            if twice := [key for key in keys if keys.count(key) > 1]:
                raise ValueError(f"{path} names {twice[0]} twice, line {node.start_mark.line + 1} and on: give it once")
            parts = [value for _, value in parts]
        waiting += parts


def _replaced(parsed: Namespace, defaults: Namespace) -> list[str]:
    """Which of agent and reward have another class than the default."""
    both = [key for key in ("agent", "reward") if parsed.get(key) and defaults.get(key)]
    return [key for key in both if _class_path(parsed[key]) != _class_path(defaults[key])]


def _class_path(value: Any) -> str:
    return value if isinstance(value, str) else str(getattr(value, "class_path", value))
