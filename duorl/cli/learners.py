"""The learners by their short names. Each is imported when it is used."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from pathlib import Path

from duorl.extensions import find, make_reachable
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
    """
    for text in _texts(words):
        for name in _NAME.findall(text):
            if name in LEARNERS:
                path, _, attribute = LEARNERS[name].rpartition(".")
                getattr(import_module(path), attribute)
            elif "." in name:
                make_reachable(name)


def _texts(words: Sequence[str]) -> Iterable[str]:
    for word in words:
        yield word
        path = Path(word.partition("=")[2] if word.startswith("--") else word)
        if path.suffix in _YAML and path.is_file():
            yield path.read_text(encoding="utf8", errors="replace")
