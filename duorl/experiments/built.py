"""The options of an experiment from plain values: as they stand in a run's configuration, or are typed.

A parser of jsonargparse knows all options of an experiment, their types and defaults. The command line fills one and
reads words with it. A job in another process fills one too, and reads the run's configuration (`again`).
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Collection
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace, lazy_instance

from duorl.checks import in_words
from duorl.devices import DeviceOptions, MapOptions, TrainerDeviceOptions
from duorl.experiments.learners import LEARNERS, LearnerFactory, make_known, named
from duorl.experiments.table import COMMANDS
from duorl.runs.folders import CONFIG

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
AGENT, _AGENTS = "PPO", ("PPO", "REINFORCE")
"""What `train` and `compare` train by default."""
_FLAGS = {
    "overwrite": "replace the run in the output folder",
    "resume": "continue the run in the output folder",
    "quick": "other defaults, for a look: few windows, and with `paper` short trainings, and Fig. 8 on small models if "
    "there is no dense.json; results are noisy",
    "whole": "also write the weights of the model itself, so that the folder needs nothing else",
}
_WHERE = {"device": DeviceOptions, "map": MapOptions, "trainer": TrainerDeviceOptions}


def condensed(message: str) -> str:
    """The parser's words on an option with several types: what each type says of it, once, and what was given."""
    before, _, rest = message.partition("Does not validate against any of the Union subtypes")
    _, _, errors = rest.partition("Errors:")
    said, _, given = errors.partition("Given value type:")
    _, _, value = given.partition("Given value:")
    reasons = list(dict.fromkeys(reason.strip() for reason in re.split(r"\n\s*- ", said) if reason.strip()))
    return f"{before}{' or '.join(map(condensed, reasons))} (given:{value})" if reasons else message


def option_class(name: str) -> Any:
    """The class with the options of an experiment."""
    module, _, options = COMMANDS[name].options.partition(":")
    return getattr(import_module(module), options)


def fill(
    parser: ArgumentParser,
    name: str,
    without: Collection[str] = (),
    price: float | None = None,
    quick: bool = False,
) -> None:
    """Add the options of an experiment to a parser.

    Args:
        parser: the parser.
        name: name of the experiment.
        without: the options among `agent` and `reward` that get no default.
        price: the price of a default reward; None: `DEFAULT_PRICE`.
        quick: whether the defaults are those of `--quick`.
    """
    flags, kind = COMMANDS[name].flags, option_class(name)
    parser.add_argument("--config", action="config", help="YAML file with the options below")
    parser.add_class_arguments(kind, skip=set({"train": _COMPARE_ONLY, "compare": _TRAIN_ONLY}.get(name, ())))
    for flag in flags:
        if flag in _FLAGS:
            parser.add_argument(f"--{flag}", action="store_true", help=_FLAGS[flag])
    for flag, where in _WHERE.items():
        if flag in flags:
            parser.add_class_arguments(where)
    if quick:
        parser.set_defaults(kind.quick())
    if name in ("train", "compare"):
        _add_defaults(parser, name, without, price)
    elif price is not None and name == "evaluate":
        parser.set_defaults({"price": price})


def _add_defaults(parser: ArgumentParser, name: str, without: Collection[str], price: float | None) -> None:
    from duorl.experiments.options import DEFAULT_PRICE
    from duorl.rewards import LossImprovement

    parser.set_defaults(
        {"reward": None if "reward" in without else lazy_instance(LossImprovement, price=price or DEFAULT_PRICE)}
    )
    if name == "train":
        learners = f"the learner, {', '.join(LEARNERS)}, or an import path"
        default = None if "agent" in without else named(AGENT)
        parser.add_argument("--agent", type=LearnerFactory, default=default, help=learners)
    else:
        parser.set_defaults({"agents": {name: {"class_path": LEARNERS[name]} for name in _AGENTS}})


def instantiated(parser: ArgumentParser, parsed: Namespace) -> Namespace:
    """Parsed options with their classes made.

    Raises:
        ValueError: a class refuses its arguments; names it.
    """
    try:
        return parser.instantiate(parsed)
    except (Exception, SystemExit) as error:  # a user's class may raise anything
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        said = in_words(cause)
        kind = re.search(r"class_path='([\w.]+)'", str(error))
        where = f"{kind[1]}: " if kind and kind[1] not in said else ""
        raise ValueError(f"{where}{condensed(said)}") from error


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
        said = condensed(str(error)).replace('Parser key "', 'option "')
        raise ValueError(f"{where}: {said}") from error
    hints = get_type_hints(kind if dataclasses.is_dataclass(kind) else kind.__init__)
    for name, value in values.items():
        if value is None and type(None) not in get_args(hints[name]):
            raise ValueError(f"{where}: {name} cannot be null")
    return {name: built[name] for name in values}


def again(name: str, run: Path) -> tuple[Namespace, dict[str, Any]]:
    """The options of an experiment in a folder, and the same as plain values, for a job in another process.

    Args:
        name: name of the experiment.
        run: its folder.
    """
    from duorl.models.gateway import quieten  # it imports transformers

    quieten()
    text = (run / CONFIG).read_text(encoding="utf8")
    make_known([text])
    parser = ArgumentParser(exit_on_error=False)
    fill(parser, name)
    parsed = parser.parse_string(text)
    return instantiated(parser, parsed), yaml.safe_load(parser.dump(parsed, skip_unset=False))
