"""The parser of one command, built from its typed options."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import io
import re
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Collection, Sequence
from contextlib import redirect_stderr
from importlib import import_module
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

import torch
import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, lazy_instance

from duorl.cli.commands import COMMANDS, fail, in_words
from duorl.cli.learners import LEARNERS, LearnerFactory, make_known, named, spelled, yaml_files
from duorl.devices import DeviceOptions, MapOptions, TrainerDeviceOptions, pick_device, pick_dtype
from duorl.extensions import find
from duorl.models.bases import find_base
from duorl.models.loading import price_of_model, width_of_model
from duorl.runs.folders import versions
from duorl.version import VERSION

_COMPARE_ONLY = (
    "agents",
    "starts",
    "seeds",
    "processes",
    "cluster",
    "targets",
    "reach_targets",
    "transfer",
    "knowable",
)
_TRAIN_ONLY = ("target_compute",)
_AGENT, _AGENTS = "PPO", ("PPO", "REINFORCE")
"""What `train` and `compare` train by default."""
_FLAGS = {
    "overwrite": "replace the run in the output folder",
    "resume": "continue the run in the output folder",
    "quick": "other defaults, for a look: few windows, and with `paper` short trainings, and Fig. 8 on small models if "
    "there is no dense.json; results are noisy",
    "whole": "also write the weights of the model itself, so that the folder needs nothing else",
}
_WHERE = {"device": DeviceOptions, "map": MapOptions, "trainer": TrainerDeviceOptions}


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
        line = " ".join(_condensed(str(message)).split()).replace('Parser key "', 'option "')
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
    return [name for name, path in LEARNERS.items() if name == _AGENT or path.rpartition(".")[0] in sys.modules]


def _condensed(message: str) -> str:
    """The parser's words on an option with several types: what each type says of it, once, and what was given."""
    before, _, rest = message.partition("Does not validate against any of the Union subtypes")
    _, _, errors = rest.partition("Errors:")
    said, _, given = errors.partition("Given value type:")
    _, _, value = given.partition("Given value:")
    reasons = list(dict.fromkeys(reason.strip() for reason in re.split(r"\n\s*- ", said) if reason.strip()))
    return f"{before}{' or '.join(map(_condensed, reasons))} (given:{value})" if reasons else message


def build_parser(name: str, without: Collection[str] = (), price: float | None = None, quick: bool = False) -> _Parser:
    """The parser of a command.

    Args:
        name: name of the command.
        without: the options among `agent` and `reward` that get no default.
        price: the price of a default reward; None: that of the command line.
        quick: whether the defaults are those of `--quick`.
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
        if flag in _FLAGS:
            parser.add_argument(f"--{flag}", action="store_true", help=_FLAGS[flag])
    for flag, where in _WHERE.items():
        if flag in command.flags:
            parser.add_class_arguments(where)
    if quick:
        parser.set_defaults(kind.quick())
    if name in ("train", "compare"):
        _add_defaults(parser, name, without, price)
    elif price is not None and name == "evaluate":
        parser.set_defaults({"price": price})
    return parser


def _add_defaults(parser: _Parser, name: str, without: Collection[str], price: float | None) -> None:
    from duorl.cli.options import DEFAULT_PRICE
    from duorl.rewards import LossImprovement

    parser.epilog = _rewards_section()
    parser.set_defaults(
        {"reward": None if "reward" in without else lazy_instance(LossImprovement, price=price or DEFAULT_PRICE)}
    )
    if name == "train":
        learners = f"the learner, {', '.join(LEARNERS)}, or an import path"
        default = None if "agent" in without else named(_AGENT)
        parser.add_argument("--agent", type=LearnerFactory, default=default, help=learners)
    else:
        parser.set_defaults({"agents": {name: {"class_path": LEARNERS[name]} for name in _AGENTS}})


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
    return _instantiated(parser, parsed), text


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


def _instantiated(parser: _Parser, parsed: Namespace) -> Namespace:
    try:
        return parser.instantiate(parsed)
    except (Exception, SystemExit) as error:  # a user's class may raise anything
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        said = in_words(cause)
        named = re.search(r"class_path='([\w.]+)'", str(error))
        where = f"{named[1]}: " if named and named[1] not in said else ""
        raise ValueError(f"{where}{_condensed(said)}") from error


def typed(kind: Callable[..., Any], values: Any, where: str, skip: Collection[str] = ()) -> dict[str, Any]:
    """Options that are given as a dictionary within an option, with the types that a class asks for.

    Args:
        kind: the class.
        values: the dictionary.
        where: its name.
        skip: arguments of the class that are not options.

    Raises:
        ValueError: it is no dictionary, or holds an unknown option or a value of another type; names it.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be options by name, not {values!r}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, skip=set(skip))
    if unknown := [name for name in values if name not in inspect.signature(kind).parameters or name in skip]:
        raise ValueError(f"{where}: {unknown[0]!r} is not an option there")
    try:
        parsed = parser.parse_object(values)
        built = parser.instantiate(parsed)
    except Exception as error:  # the parser's own, or the class's
        said = _condensed(str(error)).replace('Parser key "', 'option "')
        raise ValueError(f"{where}: {said}") from error
    hints = get_type_hints(kind if dataclasses.is_dataclass(kind) else kind.__init__)
    for name, value in values.items():
        if value is None and type(None) not in get_args(hints[name]):
            raise ValueError(f"{where}: {name} cannot be null")
    return {name: built[name] for name in values}


def _replaced(parsed: Namespace, defaults: Namespace) -> list[str]:
    """Which of agent and reward have another class than the default."""
    both = [key for key in ("agent", "reward") if parsed.get(key) and defaults.get(key)]
    return [key for key in both if _class_path(parsed[key]) != _class_path(defaults[key])]


def _class_path(value: Any) -> str:
    return value if isinstance(value, str) else str(getattr(value, "class_path", value))


def read_config(text: str) -> dict[str, Any]:
    """The complete options as plain values."""
    return yaml.safe_load(text) or {}
