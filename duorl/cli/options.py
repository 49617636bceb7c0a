"""The options of the commands that have no home of their own: typed, documented, the same in YAML and as flags."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from agents import PPO, REINFORCE, Agent
from duorl.checks import require_positive
from duorl.evaluate import EvaluationOptions
from duorl.models.config import Skip
from duorl.oracle import SearchContext
from duorl.paper import StudySize
from duorl.rewards import LossImprovement, Reward
from duorl.routed_pass import Context
from duorl.routers import EnsembleOptions, KNNOptions, SoftOptions, SupervisedOptions
from duorl.routers.heads import check_prices
from envs import Lockstep

# What the command line charges unless told: dear enough that a fixed pattern leaves something to win on duo-tiny
# (docs/experiments.md, "How the defaults were chosen").
DEFAULT_PRICE = 0.3

AgentFactory = Callable[[Lockstep], Agent]


@dataclass(frozen=True)
class EnvironmentOptions:
    """The tokens that an agent learns on.

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
        signals: routers also see how far the layer before moved a token's state.
        big_layers: exactly so many layers of every token must be big; for MaskablePPO and REINFORCE.
    """

    window: int = 128
    context: Context = "routed"
    windows_per_batch: int = 8
    group_size: int = 2
    token_discount: float = 0.0
    prices: tuple[float, float] | None = None
    signals: bool = False
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
        reward: what a decision earns: a class by its import path, with its arguments. Built in, all in nats:
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
        env: the tokens that agents learn on.
        own_env: options of `env` that are others for single agents, by the agents' names.
        supervised: training of the supervised router.
        soft: training of the paper's soft router.
        knn: the nearest-neighbour router.
        ensemble: training of the bootstrap ensemble.
        rivals: routers without reinforcement learning to train and compare, out of supervised, soft, knn, ensemble.
        evaluation: how routers are compared.
        validations: how often during training a router is measured on held-out router text for TensorBoard.
        seed: of everything random.
        seeds: trainings of every learner, with seeds `seed`, `seed + 1`, ...
        processes: trainings side by side; the machine's cores are divided among them. As many as cores unless given.
        targets: computes at which all routers are compared; needs `env.prices`.
        knowable: hidden units per head of the network that estimates what could have been known without the label,
            which splits the regret; 0 for none.
        out: the run's folder; the first free `runs/NAME-N` unless given.
    """

    agents: dict[str, AgentFactory]
    reward: Reward = field(default_factory=lambda: LossImprovement(DEFAULT_PRICE))
    model: str = "duo-tiny"
    skip: Skip | None = None
    corpus: list[str] | str = field(default_factory=lambda: ["stdlib-code"])
    actions: list[str] = field(default_factory=lambda: ["small", "big"])
    reference: str = "small"
    total_decisions: int = 8_000_000
    target_compute: float | None = None
    env: EnvironmentOptions = field(default_factory=EnvironmentOptions)
    own_env: dict[str, dict[str, Any]] = field(default_factory=dict)
    supervised: SupervisedOptions = field(default_factory=SupervisedOptions)
    soft: SoftOptions = field(default_factory=SoftOptions)
    knn: KNNOptions = field(default_factory=KNNOptions)
    ensemble: EnsembleOptions = field(default_factory=EnsembleOptions)
    rivals: list[Literal["supervised", "soft", "knn", "ensemble"]] = field(
        default_factory=lambda: ["supervised", "soft"]
    )
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    validations: int = 10
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
    """Search all routes of held-out tokens and print the best loss per number of big layers.

    Args:
        model: `duo-tiny` or a folder.
        skip: what the action `skip` drops, `ffn` or `block`; as the model was saved unless given.
        corpus: built-in corpora, or paths and globs.
        actions: names of the allowed actions.
        context: `reference` (the tokens before were routed all-big), `uniform` (the same route for all tokens) or
            `routed` (token after token, each given the best routes of those before it).
        price: nats per all-big pass that the oracle pays, for what it commits and for the tokens' difficulty.
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
    memory_limit: int = 2**30
    window: int = 128
    windows: int = 8
    seed: int = 0
    out: str | None = None


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
        soft: training of the paper's router; its budget is set by the study.
        size: how much is measured.
        dense: dense.json of `duorl dense`, or its folder, for Fig. 8; that of the model's folder unless given.
        skip: what the action `skip` drops, `ffn` or `block`; as the model was saved unless given.
        seed: of everything random.
        out: folder for the figures, claims.md and report.html; the first free `runs/paper-N` unless given.
    """

    model: str = "duo-tiny"
    prose: list[str] | str = "stdlib-docs"
    code: list[str] | str = "stdlib-code"
    agents: dict[str, AgentFactory] = field(default_factory=lambda: {"PPO": PPO, "REINFORCE": REINFORCE})
    total_decisions: int = 4_000_000
    env: EnvironmentOptions = field(default_factory=EnvironmentOptions)
    soft: SoftOptions = field(default_factory=SoftOptions)
    size: StudySize = field(default_factory=StudySize)
    dense: str | None = None
    skip: Skip | None = None
    seed: int = 0
    out: str | None = None
