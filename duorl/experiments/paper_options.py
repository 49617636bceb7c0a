"""The options of `duorl paper`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from duorl.experiments.learners import LearnerFactory, named
from duorl.experiments.options import EnvironmentOptions, Skip
from duorl.paper.size import StudySize
from duorl.paths import DuoPath, FilePath, OptionsOf, TextPath


@dataclass(frozen=True)
class PaperOptions:
    """Repeat the study of Duo-LLM on a duo model: every figure as PNG and JSON, and the claims with measurements.

    Args:
        model: `duo-tiny`, `smollm2`, a folder, or `owner/name` on the hub.
        prose: text in place of the paper's web text: built-in corpora, or paths and globs.
        code: text in place of the paper's Python code: built-in corpora, or paths and globs.
        agents: learners of DuoRL in Fig. 4b and 7.
        total_decisions: number of layer decisions that each agent learns from.
        env: the text and the environment of the training.
        soft: options of the paper's router, the learner `Soft`; the study sets its budget.
        soft_windows: windows in each update of the soft router.
        size: number of windows, patterns and prices.
        dense: dense.json of `duorl dense`, or its folder, for Fig. 8; by default the one in the model's folder.
        skip: what the action `skip` leaves out, `ffn` or `block` (docs/explanation/oracle.md); by default that of the
            saved model.
        seed: seed of all random generators.
        processes: number of trainings at the same time; by default one per core.
        cluster: see `duorl compare`.
        out: folder for the figures, claims.md and report.html; by default the first free `runs/paper-N`.
    """

    model: DuoPath = "duo-tiny"
    prose: list[TextPath] | TextPath = "stdlib-docs"
    code: list[TextPath] | TextPath = "stdlib-code"
    agents: dict[str, LearnerFactory] = field(
        default_factory=lambda: {name: named(name) for name in ("PPO", "REINFORCE")}
    )
    total_decisions: int = 4_000_000
    env: EnvironmentOptions = field(default_factory=EnvironmentOptions)
    soft: Annotated[dict[str, Any], OptionsOf("duorl.learners.Soft")] = field(default_factory=dict)
    soft_windows: int = 8
    size: StudySize = field(default_factory=StudySize)
    dense: FilePath | None = None
    skip: Skip | None = None
    seed: int = 0
    processes: int | None = None
    cluster: str | None = None
    out: str | None = None

    @staticmethod
    def quick() -> dict[str, Any]:
        """The defaults with `--quick`, by name: a run of minutes, with wide intervals."""
        size = {"windows": 8, "pattern_windows": 8, "final_windows": 32, "big": (1,), "prices": (0.3,)}
        return {f"size.{name}": value for name, value in size.items()} | {
            "soft": {"updates": 40},
            "total_decisions": 200_000,
        }
