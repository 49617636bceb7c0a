"""The options of the commands: typed, documented, with the same names in YAML and as flags."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from duorl.checks import require_positive
from duorl.evaluation.options import EvaluationOptions
from duorl.experiments.learners import LearnerFactory
from duorl.models.calls import Skip
from duorl.oracle.table import SearchContext
from duorl.paths import DuoPath, RouterPath, TextPath
from duorl.prices import check_prices
from duorl.rewards import LossImprovement, Reward
from duorl.routed_pass import Context

# The default price of the command line. At this price, routers on duo-tiny can be better than a fixed pattern
# (docs/explanation/experiments.md, "How the defaults were chosen").
DEFAULT_PRICE = 0.3
QUICK = {"evaluation.effort": "quick"}
"""Defaults of trainings and evaluations with `--quick`."""


@dataclass(frozen=True)
class EnvironmentOptions:
    """The text and the environment of the training.

    Args:
        window: tokens per window, T.
        context: which keys and values a token reads from the tokens before it: `routed`, those of the tokens' own
            passes, or `reference`, those of an all-big pass.
        windows_per_batch: number of windows per episode, B.
        group_size: number of copies of each window, K; leave-one-out and group-relative baselines compare them.
        token_discount: also credits a token with the gains of later tokens, which read its keys and values. The factor
            per token of distance is this number; with 0, a token is credited with its own gain only.
        later_effects: also credits an action with what it gains later tokens, in the mean of its layer, measured before
            the training. For learners that do not use derivatives of the model, on models of many layers.
        prices: lowest and highest price. Every window then has its own price, drawn anew in every episode, and the
            price is an input of the router, so one router serves all budgets. None: only the price of the reward.
        inputs: further inputs of the routers: names from `duorl.inputs.INPUTS`, or import paths.
        big_layers: exactly this number of layers of every token must be big. MaskablePPO, REINFORCE, ReinMax and
            GFlowNet learn with this budget. Supervised, Soft, KNN and Ensemble keep it only in deployment.
    """

    window: int = 128
    context: Context = "routed"
    windows_per_batch: int = 8
    group_size: int = 2
    token_discount: float = 0.0
    later_effects: bool = False
    prices: tuple[float, float] | None = None
    inputs: list[str] = field(default_factory=list)
    big_layers: int | None = None

    def __post_init__(self) -> None:
        if self.prices is not None:
            check_prices(self.prices)
        require_positive(window=self.window, windows_per_batch=self.windows_per_batch, group_size=self.group_size)


@dataclass(frozen=True)
class RunOptions:
    """Train routers by reinforcement learning and compare them on held-out text with the oracle and other routers.

    Args:
        agents: the learners, by their names in tables and pictures; by default PPO and REINFORCE.
        reward: import path of a class, with its arguments, or of a function. Built in, in nats:
            LossImprovement (price), TeacherKL (price, share), LogitLensShaping (scale), RedundancyCharge (charge,
            threshold), Sum (rewards); in accepted tokens: Acceptance (price, sampled). See docs/reference/rewards.md.
        model: `duo-tiny` or `smollm2`, for which the package has networks, a folder, or `owner/name` on the hub.
        skip: what the action `skip` leaves out, `ffn` or `block` (docs/explanation/oracle.md); by default that of the
            saved model.
        corpus: built-in corpora (stdlib-code, stdlib-docs, stdlib-tests), or paths and globs of .txt, .jsonl
            and .parquet files.
        actions: names of the allowed actions, out of skip, small, big.
        reference: action of the reference route in every layer; its loss is the reference loss of the gain.
        total_decisions: number of layer decisions that each agent learns from.
        target_compute: target of the compute, as a share of an all-big pass, in place of a price. The price is found by
            dual ascent in the training; with `env.prices`, after the training. See docs/how-to/budgets.md.
        env: the text and the environment of the training.
        own_env: options of `env` for single learners, by the learner's name; rivals too.
        starts: for single learners, by name: the learner, named before it, from whose router with the same seed its
            training starts.
        rivals: learners to compare with: a list of names, or learners by name as in `agents`.
        labels: folder of labels, made by `duorl label`, for the learners from labels: they do not search anew.
        evaluation: how routers are compared.
        validations: number of measurements on held-out router text during the training, for TensorBoard.
        save_every: seconds between the checkpoints of a training.
        seed: seed of all random generators.
        seeds: number of trainings of every learner, with seeds `seed`, `seed + 1`, ...
        processes: number of trainings at the same time; they share the machine's cores. By default one per core.
        cluster: `auto` for the Ray cluster of this machine, or the HOST:PORT of its head: trainings run on its
            machines, in place of processes here. It needs the extra `ray`, see docs/how-to/machines.md.
        targets: values of the compute at which all routers are compared; needs `env.prices`.
        reach_targets: every router is also measured calibrated to each of the targets, so that it reaches those that no
            price of `env.prices` meets: costs are then subtracted from its logits. See docs/how-to/budgets.md.
        transfer: further texts, as for `corpus`, on which no router learns. All routers are compared on them at
            `targets`, also after a calibration without labels on the first `evaluation.final_windows` windows of their
            router split. See docs/how-to/budgets.md.
        knowable: hidden units per head of a large network that estimates the avoidable part of the regret
            (`regret_avoidable`, docs/reference/metrics.md); 0: no estimate.
        out: folder of the run; by default the first free `runs/NAME-N`.
    """

    agents: dict[str, LearnerFactory] = field(default_factory=dict)  # the parser knows the default ones
    reward: Reward | Callable = field(default_factory=lambda: LossImprovement(DEFAULT_PRICE))
    model: DuoPath = "duo-tiny"
    skip: Skip | None = None
    corpus: list[TextPath] | TextPath = field(default_factory=lambda: ["stdlib-code"])
    actions: list[str] = field(default_factory=lambda: ["small", "big"])
    reference: str = "small"
    total_decisions: int = 8_000_000
    target_compute: float | None = None
    env: EnvironmentOptions = field(default_factory=EnvironmentOptions)
    own_env: dict[str, dict[str, Any]] = field(default_factory=dict)
    starts: dict[str, str] = field(default_factory=dict)
    rivals: list[str] | dict[str, LearnerFactory] = field(default_factory=lambda: ["supervised", "soft"])
    labels: RouterPath | None = None
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    validations: int = 10
    save_every: float = 120.0
    seed: int = 0
    seeds: int = 1
    processes: int | None = None
    cluster: str | None = None
    targets: list[float] = field(default_factory=list)
    reach_targets: bool = False
    transfer: list[TextPath] = field(default_factory=list)
    knowable: int = 0
    out: str | None = None

    @staticmethod
    def quick() -> dict[str, Any]:
        """The defaults with `--quick`, by name."""
        return QUICK


@dataclass(frozen=True)
class EvaluateOptions:
    """Measure one saved router on held-out text, beside the best fixed pattern and the oracle.

    Args:
        router: folder of a saved router.
        model: `duo-tiny`, `smollm2`, a folder, or `owner/name` on the hub.
        skip: what the action `skip` leaves out, `ffn` or `block` (docs/explanation/oracle.md); by default that of the
            saved model.
        corpus: built-in corpora, or paths and globs.
        actions: names of the actions that the oracle and the fixed pattern may take.
        reference: action of the reference route in every layer; its loss is the reference loss of the gain.
        price: price of an all-big pass, in nats.
        target_compute: the router is also measured calibrated to this compute, as a share of an all-big pass. It is
            calibrated without labels, on the first `evaluation.fixed_windows` windows of the router split of `corpus`.
        learned_on: the text that the router learned on, as for `corpus`. The router's loss and compute on its
            evaluation split, and the drift of the compute to `corpus`, are also reported.
        tasks: tasks of lm-evaluation-harness, or YAML files of your own, as a list or with commas between them; the
            router is also measured on them, beside all-big, all-small and the best fixed pattern. Needs the extra
            `lm-eval`.
        task_questions: first questions of each task; by default all.
        task_batch: texts per pass in the tasks.
        window: tokens per window.
        evaluation: how the router is measured.
        out: folder for comparison.json, comparison.csv and the figure; by default the first free `runs/evaluate-N`.
    """

    router: RouterPath
    model: DuoPath = "duo-tiny"
    skip: Skip | None = None
    corpus: list[TextPath] | TextPath = field(default_factory=lambda: ["stdlib-code"])
    actions: list[str] = field(default_factory=lambda: ["small", "big"])
    reference: str = "small"
    price: float = DEFAULT_PRICE
    target_compute: float | None = None
    learned_on: list[TextPath] | TextPath | None = None
    tasks: list[str] | str = field(default_factory=list)
    task_questions: int | None = None
    task_batch: int = 8
    window: int = 128
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    out: str | None = None

    @staticmethod
    def quick() -> dict[str, Any]:
        """The defaults with `--quick`, by name."""
        return QUICK


@dataclass(frozen=True)
class OracleOptions:
    """Search the best route of every held-out token, and print the losses per number of big layers.

    With `--resume`, a stopped search goes on with the shards that it has, and more `windows` extend a finished one.

    Args:
        model: `duo-tiny`, `smollm2`, a folder, or `owner/name` on the hub.
        skip: what the action `skip` leaves out, `ffn` or `block` (docs/explanation/oracle.md); by default that of the
            saved model.
        corpus: built-in corpora, or paths and globs.
        actions: names of the allowed actions.
        context: `reference` (the tokens before it are all-big), `uniform` (the same route for all tokens) or `routed`
            (one token after the other, after the best routes of the tokens before it).
        price: nats per all-big pass, for the routes in the `routed` context and for the difficulty of the tokens.
        method: `exhaustive` tries all routes. Coordinate `descent` and `beam` search are for deeper models; their
            returns are lower bounds of the oracle's. `auto` is exhaustive if this fits into the memory limit, and
            descent otherwise.
        memory_limit: bytes for the table of all losses and the search, in each process.
        window: tokens per window.
        windows: number of windows of the evaluation split to search.
        shard: windows per shard, which is one job; they are searched at once, as far as the memory limit permits.
        seed: seed of the random routes in the comparison.
        processes: number of jobs at the same time; by default one per core.
        cluster: see `duorl compare`.
        out: folder for oracle.json and the difficulty of the tokens; by default the first free `runs/oracle-N`.
    """

    model: DuoPath = "duo-tiny"
    skip: Skip | None = None
    corpus: list[TextPath] | TextPath = field(default_factory=lambda: ["stdlib-code"])
    actions: list[str] = field(default_factory=lambda: ["small", "big"])
    context: SearchContext = "reference"
    price: float = 0.0
    method: Literal["auto", "exhaustive", "descent", "beam"] = "auto"
    memory_limit: int = 2**30
    window: int = 128
    windows: int = 8
    shard: int = 8
    seed: int = 0
    processes: int | None = None
    cluster: str | None = None
    out: str | None = None


@dataclass(frozen=True)
class LabelOptions:
    """Search the routes of router text once, for all learners from labels.

    Supervised, KNN and Ensemble take the folder: `--labels DIR` of `duorl train` and `compare`. With `--resume` and a
    higher number of `windows`, the folder grows, and what it has stays.

    Args:
        model: `duo-tiny`, `smollm2`, a folder, or `owner/name` on the hub.
        skip: what the action `skip` leaves out, `ffn` or `block` (docs/explanation/oracle.md); by default that of the
            saved model.
        corpus: built-in corpora, or paths and globs.
        actions: names of the allowed actions.
        base: label deviations from the routes of this policy: `random`, the name of an action, or the folder of a
            saved router. By default, all routes are searched if there are at most 1,024; else `random`.
        price: nats per all-big pass, for a router as the base policy.
        prices: lowest and highest price, for a base policy for a range of prices; each token is at one of five.
        window: tokens per window.
        windows: number of windows of the router split to label, rounded up to whole shards.
        shard: windows per shard, which is one job.
        seed: seed of the random routes.
        processes: number of jobs at the same time; by default one per core.
        cluster: see `duorl compare`.
        out: folder of the labels; by default the first free `runs/labels-N`.
    """

    model: DuoPath = "duo-tiny"
    skip: Skip | None = None
    corpus: list[TextPath] | TextPath = field(default_factory=lambda: ["stdlib-code"])
    actions: list[str] = field(default_factory=lambda: ["small", "big"])
    base: RouterPath | None = None
    price: float = DEFAULT_PRICE
    prices: tuple[float, float] | None = None
    window: int = 128
    windows: int = 64
    shard: int = 8
    seed: int = 0
    processes: int | None = None
    cluster: str | None = None
    out: str | None = None


@dataclass(frozen=True)
class GenerateOptions:
    """Generate a text and show what each of its tokens has cost.

    Args:
        prompt: the text to go on with.
        router: folder of a saved router, `owner/name` on the hub, or `small` or `big` for all tokens.
        model: `duo-tiny`, `smollm2`, a folder, or `owner/name` on the hub.
        price: for a router for a range of prices, nats per all-big pass.
        draft: a cheap router, as for `router`. It drafts tokens, which the model with its router verifies: the same
            text, sooner.
        lookup: tokens that followed the last ones before are also verified, at most this number.
        chat: the prompt is a message to an instruct model; the tokenizer's template is used.
        max_new_tokens: most tokens to generate.
        temperature: 0 takes the most likely token, 1 samples as the model predicts.
        seed: seed of the sampling.
        show: `text` colours each token by its compute; `routes` also prints the route of each token.
        html: file for a page of the text, in which a click on a token shows its route, loss and the alternatives.
    """

    prompt: str
    router: RouterPath = "big"
    model: DuoPath = "duo-tiny"
    price: float | None = None
    draft: RouterPath | None = None
    lookup: int | None = None
    chat: bool = False
    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0
    show: Literal["text", "routes"] = "text"
    html: str | None = None


@dataclass(frozen=True)
class ReportOptions:
    """Write report.html, one self-contained page, for a run.

    Args:
        run: folder of a comparison or of a paper run.
    """

    run: str
