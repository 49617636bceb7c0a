"""The options of `duorl paper`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from duorl.cli.learners import LearnerFactory, named
from duorl.cli.options import EnvironmentOptions, Skip
from duorl.paper.size import StudySize


@dataclass(frozen=True)
class PaperOptions:
    """Redo the study of Duo-LLM on a duo model: every figure as PNG and JSON, and the paper's claims beside them.

    Args:
        model: `duo-tiny` or a folder.
        prose: text that stands for the paper's web text: built-in corpora, or paths and globs.
        code: text that stands for its Python.
        agents: this project's learners that stand in Fig. 4b and 7.
        total_decisions: layer decisions that each of them learns from.
        env: the tokens that they learn on.
        soft: options of the paper's router, the learner `Soft`; its budget is set by the study.
        soft_windows: windows in each of its updates.
        size: how much is measured.
        dense: dense.json of `duorl dense`, or its folder, for Fig. 8; that of the model's folder unless given.
        skip: what the action `skip` drops, `ffn` or `block`; as the model was saved unless given.
        seed: of everything random.
        out: folder for the figures, claims.md and report.html; the first free `runs/paper-N` unless given.
    """

    model: str = "duo-tiny"
    prose: list[str] | str = "stdlib-docs"
    code: list[str] | str = "stdlib-code"
    agents: dict[str, LearnerFactory] = field(
        default_factory=lambda: {name: named(name) for name in ("PPO", "REINFORCE")}
    )
    total_decisions: int = 4_000_000
    env: EnvironmentOptions = field(default_factory=EnvironmentOptions)
    soft: dict[str, Any] = field(default_factory=dict)
    soft_windows: int = 8
    size: StudySize = field(default_factory=StudySize)
    dense: str | None = None
    skip: Skip | None = None
    seed: int = 0
    out: str | None = None
