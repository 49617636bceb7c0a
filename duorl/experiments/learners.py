"""The learners by their short names. Each is imported when it is used."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import pairwise
from pathlib import Path

from duorl.extensions import find, import_named, make_reachable
from duorl.learners.base import Learner, Task

LearnerFactory = Callable[[Task], Learner]
"""A learner with its options, without its environment; a class path and init_args on the command line."""

LEARNERS = {
    **{name: f"duorl.agents.{name}" for name in ("PPO", "A2C", "MaskablePPO", "REINFORCE", "ReinMax")},
    **{name: f"duorl.agents.{name}" for name in ("DQN", "MEX", "GFlowNet")},
    **{name: f"duorl.learners.{name}" for name in ("Supervised", "Soft", "KNN", "Ensemble")},
}
_SPOKEN = {name.lower(): name for name in LEARNERS}
_NAME = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")
_CLASS_PATH = re.compile(r"""class_path["']?\s*:\s*["']?([A-Za-z_][\w.]*\w)""")
_NAMING = ("--reward", "--agent")
_HELP = {"--agent.help": "PPO", "--reward.help": "duorl.rewards.LossImprovement"}
_YAML = (".yaml", ".yml", ".json")


def named(name: str) -> type[Learner]:
    """The class of a learner, by its short name in upper or lower case, or by its import path.

    Raises:
        ValueError: there is no learner with this name.
    """
    path = LEARNERS.get(_SPOKEN.get(name.lower(), ""), name)
    if "." not in path:
        raise ValueError(f"unknown learner {name!r}: choose from {', '.join(LEARNERS)}, or give an import path")
    kind = find(path)
    if not (isinstance(kind, type) and issubclass(kind, Learner)):
        raise ValueError(f"{path} is not a Learner")
    return kind


def make_known(words: Sequence[str]) -> None:
    """Import the learners that a command line names, and make a user's modules importable.

    The parser finds a class by its short name only if it is imported, and a user's class only on `sys.path`.

    Args:
        words: the command line; YAML files in it are read too.

    Raises:
        ValueError: a named module cannot be imported; the message says why.
    """
    for text in _texts(words):
        for name in _NAME.findall(text):
            if name in LEARNERS:
                path, _, attribute = LEARNERS[name].rpartition(".")
                getattr(import_module(path), attribute)
            elif "." in name:
                make_reachable(name)
        for name in _CLASS_PATH.findall(text):
            _try_import(name)
    for flag, word in pairwise((*words, "")):
        name = word if flag in _NAMING else flag.partition("=")[2] if flag.partition("=")[0] in _NAMING else ""
        if _NAME.fullmatch(name):
            _try_import(name)


def spelled(words: Sequence[str]) -> list[str]:
    """The words of a command line with the short name after `--agent` as it is written in `LEARNERS`.

    A question for help without a class is about that of the command line.
    """
    found: list[str] = []
    for flag, word in pairwise(("", *words)):
        if flag in _HELP and word.startswith("--"):
            found.append(_HELP[flag])
        name, equals, value = word.partition("=")
        if flag in ("--agent", "--agent.help"):
            word = _SPOKEN.get(word.lower(), word)
        elif name in ("--agent", "--agent.help"):
            word = name + equals + _SPOKEN.get(value.lower(), value)
        found.append(word)
    return found if not words or words[-1] not in _HELP else [*found, _HELP[words[-1]]]


def _try_import(name: str) -> None:
    """Find out why a module cannot be imported: the parser would only say that a class is not there."""
    module = name.rpartition(".")[0]
    if module and module.partition(".")[0] != "duorl":
        import_named(module)


def yaml_files(words: Sequence[str]) -> list[Path]:
    """The files of options that are named on a command line."""
    paths = (Path(word.partition("=")[2] if word.startswith("--") else word) for word in words)
    return [path for path in paths if path.suffix in _YAML and path.is_file()]


def _texts(words: Sequence[str]) -> list[str]:
    return [*words, *(path.read_text(encoding="utf8", errors="replace") for path in yaml_files(words))]
