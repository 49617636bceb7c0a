"""The options of the commands that have no home of their own: typed, documented, the same in YAML and as flags."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from duorl.checks import require_positive
from duorl.cli.learners import LearnerFactory
from duorl.evaluation.options import EvaluationOptions
from duorl.models.calls import Skip
from duorl.oracle.table import SearchContext
from duorl.prices import check_prices
from duorl.rewards import LossImprovement, Reward
from duorl.routed_pass import Context

# What the command line charges unless told: dear enough that a fixed pattern leaves something to win on duo-tiny
# (docs/experiments.md, "How the defaults were chosen").
DEFAULT_PRICE = 0.3


@dataclass(frozen=True)
class EnvironmentOptions:
    """The tokens that a learner learns on.

    Args:
        window: tokens per window, T.
        context: which keys and values a token reads: `routed`, those of the tokens' own passes, or `reference`,
            those of an all-big pass.
        windows_per_batch: windows in lockstep, B.
        group_size: copies of each window side by side, K; leave-one-out and group-relative baselines compare them.
        token_discount: a learner is also credited with the gains of later tokens, which read what a token's route
            wrote, times this per token of distance; 0 credits a token with its own gain alone.
        prices: lowest and highest price: every window then has its own, drawn anew in every episode, and the router
            takes the price as an input, so that one training answers for all budgets; none, the reward's price alone.
        inputs: what routers also see, by the names in `duorl.inputs.INPUTS` or by import path.
        big_layers: exactly so many layers of every token must be big; MaskablePPO, REINFORCE, ReinMax and
            GFlowNet learn under that budget; Supervised, Soft, KNN and Ensemble only keep it when deployed.
    """

    window: int = 128
    context: Context = "routed"
    windows_per_batch: int = 8
    group_size: int = 2
    token_discount: float = 0.0
    prices: tuple[float, float] | None = None
    inputs: list[str] = field(default_factory=list)
    big_layers: int | None = None

    def __post_init__(self) -> None:
        if self.prices is not None:
            check_prices(self.prices)
        require_positive(window=self.window, windows_per_batch=self.windows_per_batch, group_size=self.group_size)


@dataclass(frozen=True)
class RunOptions:
    """Train routers by reinforcement and compare them, on held-out text, with the oracle and all other routers.

    Args:
        agents: learners by the name that tables and pictures give them.
        reward: what a decision earns: a class by its import path, with its arguments, or a function. Built in, in nats:
            LossImprovement (price), TeacherKL (price, share), LogitLensShaping (scale), RedundancyCharge (charge,
            threshold), Sum (rewards). See docs/rewards.md.
        model: `duo-tiny`, the model inside the package, or a folder.
        skip: what the action `skip` drops, `ffn` or `block`; as the model was saved unless given.
        corpus: built-in corpora (stdlib-code, stdlib-docs, stdlib-tests), or paths and globs of .txt, .jsonl
            and .parquet files.
        actions: names of the allowed actions, out of skip, small, big.
        reference: action of the reference route, whose loss gains are measured against.
        total_decisions: layer decisions that each agent learns from.
        target_compute: share of an all-big pass to spend, in place of a price: the price is found by dual ascent in
            training, or, where `env.prices` makes it an input, afterwards; see docs/budgets.md.
        env: the tokens that learners learn on.
        own_env: options of `env` that are others for single learners, by their names, rivals' too.
        rivals: learners to compare with: a list of names, or learners by name as in `agents`.
        evaluation: how routers are compared.
        validations: how often during training a router is measured on held-out router text for TensorBoard.
        save_every: seconds between the checkpoints of a training.
        seed: of everything random.
        seeds: trainings of every learner, with seeds `seed`, `seed + 1`, ...
        processes: trainings side by side; the machine's cores are divided among them. As many as cores unless given.
        targets: computes at which all routers are compared; needs `env.prices`.
        knowable: hidden units per head of the network that estimates what could have been known without the label,
            which splits the regret; 0 for none.
        out: the run's folder; the first free `runs/NAME-N` unless given.
    """

    agents: dict[str, LearnerFactory]
    reward: Reward | Callable = field(default_factory=lambda: LossImprovement(DEFAULT_PRICE))
    model: str = "duo-tiny"
    skip: Skip | None = None
    corpus: list[str] | str = field(default_factory=lambda: ["stdlib-code"])
    actions: list[str] = field(default_factory=lambda: ["small", "big"])
    reference: str = "small"
    total_decisions: int = 8_000_000
    target_compute: float | None = None
    env: EnvironmentOptions = field(default_factory=EnvironmentOptions)
    own_env: dict[str, dict[str, Any]] = field(default_factory=dict)
    rivals: list[str] | dict[str, LearnerFactory] = field(default_factory=lambda: ["supervised", "soft"])
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    validations: int = 10
    save_every: float = 120.0
    seed: int = 0
    seeds: int = 1
    processes: int | None = None
    targets: list[float] = field(default_factory=list)
    knowable: int = 0
    out: str | None = None


@dataclass(frozen=True)
class EvaluateOptions:
    """Measure one saved router on held-out text, beside the best fixed pattern and the oracle.

    Args:
        router: folder of a saved router.
        model: `duo-tiny` or a folder.
        skip: what the action `skip` drops, `ffn` or `block`; as the model was saved unless given.
        corpus: built-in corpora, or paths and globs.
        actions: names of the actions that the oracle and the fixed pattern may take.
        reference: action of the reference route, whose loss gains are measured against.
        price: what an all-big pass costs, in nats.
        window: tokens per window.
        evaluation: how many tokens, and intervals.
        out: folder for comparison.json, comparison.csv and the figure; the first free `runs/evaluate-N` unless given.
    """

    router: str
    model: str = "duo-tiny"
    skip: Skip | None = None
    corpus: list[str] | str = field(default_factory=lambda: ["stdlib-code"])
    actions: list[str] = field(default_factory=lambda: ["small", "big"])
    reference: str = "small"
    price: float = DEFAULT_PRICE
    window: int = 128
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    out: str | None = None


@dataclass(frozen=True)
class OracleOptions:
    """Search the best routes of held-out tokens, all of them where they can be enumerated, and print what they lose.

    Args:
        model: `duo-tiny` or a folder.
        skip: what the action `skip` drops, `ffn` or `block`; as the model was saved unless given.
        corpus: built-in corpora, or paths and globs.
        actions: names of the allowed actions.
        context: `reference` (the tokens before were routed all-big), `uniform` (the same route for all tokens) or
            `routed` (token after token, each given the best routes of those before it).
        price: nats per all-big pass that the oracle pays, for what it commits and for the tokens' difficulty.
        method: `exhaustive`, or, for models too deep to enumerate, coordinate `descent` or `beam` search, whose returns
            are lower bounds of the oracle's; `auto` is exhaustive where that fits into the memory limit, and descent
            elsewhere.
        memory_limit: bytes for the table of all losses and the search.
        window: tokens per window.
        windows: windows of the evaluation split to search.
        seed: of the random routes it is compared with.
        out: folder for oracle.json and the tokens' difficulty; the first free `runs/oracle-N` unless given.
    """

    model: str = "duo-tiny"
    skip: Skip | None = None
    corpus: list[str] | str = field(default_factory=lambda: ["stdlib-code"])
    actions: list[str] = field(default_factory=lambda: ["small", "big"])
    context: SearchContext = "reference"
    price: float = 0.0
    method: Literal["auto", "exhaustive", "descent", "beam"] = "auto"
    memory_limit: int = 2**30
    window: int = 128
    windows: int = 8
    seed: int = 0
    out: str | None = None


@dataclass(frozen=True)
class ReportOptions:
    """Write report.html, one self-contained page, for a run.

    Args:
        run: folder of a comparison or of a paper run.
    """

    run: str
