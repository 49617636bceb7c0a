"""The command line: `duorl train | compare | evaluate | oracle | pretrain`; `train.py` is `duorl train`.

Every option is typed, has the same name in YAML (`--config FILE`) and as a flag, and is explained by `--help`.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
import yaml
from jsonargparse import ArgumentParser, Namespace, lazy_instance
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeElapsedColumn
from torch import Tensor

import agents
from agents import PPO, REINFORCE, Agent
from duorl import dense, report
from duorl.allocator import keep_freed_memory
from duorl.checks import require_positive
from duorl.corpus import load_windows, source_names
from duorl.costs import ACTIONS, action_ids
from duorl.dense import DenseOptions
from duorl.difficulty import save_table, token_difficulty
from duorl.evaluate import Comparer, Comparison, EvaluationOptions, check_searches, evaluate, flatten, measure
from duorl.figures import budget_table, frontier, heat_map, markdown, table
from duorl.journal import Journal
from duorl.models import DuoForCausalLM, load, load_tokenizer
from duorl.models.config import Skip
from duorl.models.loading import model_folder
from duorl.models.pretrain import Pretraining, PretrainOptions
from duorl.oracle import SearchContext, count_routes, exhaustive
from duorl.oracle.search import states_within
from duorl.paper import Study, StudySize, claims_page, draw, scaling
from duorl.rewards import LossImprovement, Reward, price_of
from duorl.routed_pass import Context
from duorl.routers import (
    ConstantRouter,
    RandomRouter,
    Router,
    SoftOptions,
    SupervisedOptions,
    train_soft,
    train_supervised,
)
from duorl.routers import load as load_router
from envs import Lockstep, RoutingDynamics

# What the command line charges unless told: dear enough that a fixed pattern leaves something to win on duo-tiny
# (docs/experiments.md, "All routers, price 0.1").
DEFAULT_PRICE = 0.3
_VALIDATION_WINDOWS = 16
_MARK = ".duorl"  # tells a folder of ours, which --overwrite may delete, from any other with a config.yaml

console = Console()
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
    """

    window: int = 128
    context: Context = "routed"
    windows_per_batch: int = 8
    group_size: int = 2
    token_discount: float = 0.0

    def __post_init__(self) -> None:
        require_positive(window=self.window, windows_per_batch=self.windows_per_batch, group_size=self.group_size)


@dataclass(frozen=True)
class RunOptions:
    """Train routers by reinforcement and compare them, on held-out text, with the oracle and all other routers.

    Args:
        agents: learners by the name that tables and pictures give them.
        reward: what a decision earns: a class by its import path, with its arguments. Built in, all in nats:
            LossImprovement (price), LogitLensShaping (scale), Sum (rewards). See docs/rewards.md.
        model: `duo-tiny`, the model inside the package, or a folder.
        skip: what the action `skip` drops, `ffn` or `block`; as the model was saved unless given.
        corpus: built-in corpora (stdlib-code, stdlib-docs, stdlib-tests), or paths and globs of .txt, .jsonl
            and .parquet files.
        actions: names of the allowed actions, out of skip, small, big.
        reference: action of the reference route, whose loss gains are measured against.
        total_decisions: layer decisions that each agent learns from.
        env: the tokens that agents learn on.
        supervised: training of the supervised router.
        soft: training of the paper's soft router.
        evaluation: how routers are compared.
        validations: how often during training a router is measured on held-out router text for TensorBoard.
        seed: of everything random.
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
    env: EnvironmentOptions = field(default_factory=EnvironmentOptions)
    supervised: SupervisedOptions = field(default_factory=SupervisedOptions)
    soft: SoftOptions = field(default_factory=SoftOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    validations: int = 10
    seed: int = 0
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


class _Parser(ArgumentParser):
    """Errors in one line, with the nearest valid name, and exit code 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # type: ignore[override]
        """Print one line and exit."""
        line = " ".join(str(message).split()).replace('Parser key "', 'option "')
        unknown = re.search(r"(?:unrecognized arguments: --|ption ')([\w.]+)", line)
        if unknown:
            near = difflib.get_close_matches(unknown[1], self._names(), n=1, cutoff=0.4)
            line += f" (did you mean {near[0]}?)" if near else " (see --help)"
        if 'option "agent"' in line:
            line += f" (choose from {', '.join(sorted(agents.__all__[:2]))}, or give an import path)"
        fail(line)

    def _names(self) -> list[str]:
        """Names of all options, those of the subcommands too."""
        parsers = [self, *(self._subcommands_action.choices.values() if self._subcommands_action else [])]
        return sorted({name.lstrip("-") for parser in parsers for name in parser._option_string_actions})


def fail(line: str) -> NoReturn:
    """One line on standard error, exit code 2."""
    print(f"duorl: error: {line}", file=sys.stderr)
    raise SystemExit(2)


def _subparser(options: type, skip: set[str] | None = None) -> _Parser:
    parser = _Parser(description=(options.__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with the options below")
    parser.add_class_arguments(options, skip=skip)
    parser.add_argument("--overwrite", action="store_true", help="replace a run that the output folder holds")
    return parser


def _report_parser() -> _Parser:
    parser = _Parser(description="Write report.html, one self-contained page, for a run.", allow_abbrev=False)
    parser.add_argument("run", type=str, help="folder of a comparison or of a paper run")
    return parser


class Run:
    """`duorl train` and `duorl compare`: everything that can be wrong with the input is found before a folder is made.

    Args:
        options: `RunOptions`, with `agent` in place of `agents` for a single one, and the folder flags.
        config: the resolved options as YAML.

    Raises:
        ValueError, OSError: the input cannot be used; the message names the thing and the fix.
    """

    def __init__(self, options: Namespace, config: str):
        self.options, self.config = options, config
        check_folder(options)
        _check_same_options(options, config)
        require_positive(total_decisions=options.total_decisions)
        action_ids([options.reference]), action_ids(options.actions)
        self.price = LossImprovement(price_of(options.reward)).price
        self.model, self.tokenizer = load(options.model, skip=options.skip), load_tokenizer(options.model)
        read = partial(load_windows, options.corpus, self.tokenizer, length=options.env.window)
        self.training, self.validation = _hold_back(read(split="router"))
        self.held_out = read(split="evaluation")
        evaluation = options.evaluation
        counts = (evaluation.fixed_windows, evaluation.reference_windows, options.supervised.windows)
        check_searches(self.model, options.env.window, options.actions, *counts)
        self._try_reward()
        self.agents = self._make_agents()

    def __call__(self) -> None:
        """Train what the folder does not hold yet, compare, and say where everything is."""
        self.folder = make_folder(self.options, "-".join(self.agents).lower(), self.config)
        with _progress() as progress:
            learned = {
                name: self._kept(name, partial(self._learn, name, agent, progress))
                for name, agent in self.agents.items()
            }
            comparison, traces = self._compare(learned, progress)
        write(comparison, traces, self.folder)
        self._say_where()

    @property
    def _single(self) -> bool:
        return "agent" in self.options

    def _make_agents(self) -> dict[str, Agent]:
        if self._single:
            agent = self.options.agent(self._lockstep())
            return {type(agent).__name__: agent}
        if not self.options.agents:
            raise ValueError("no agents to compare: name at least one in `agents`")
        taken = {"random", *(f"all-{action}" for action in ACTIONS), "best fixed", "supervised", "soft", "oracle"}
        for name in self.options.agents:
            if name in taken or Path(name).name != name:
                raise ValueError(f"an agent cannot be called {name!r}: the comparison or the folder needs that name")
        return {name: factory(self._lockstep()) for name, factory in self.options.agents.items()}

    def _try_reward(self) -> None:
        """One episode of one window: a reward that cannot be used is found before anything is written."""
        trial = RoutingDynamics(self.model, reward=self.options.reward, actions=self.options.actions)
        trial.reset(self.training[:1])
        while not trial.done:
            trial.step(torch.zeros(self.options.env.window, dtype=torch.int64, device=self.model.device))

    def _lockstep(self) -> Lockstep:
        options = self.options
        return _lockstep(
            options, self.model, self.training, options.reward, actions=options.actions, reference=options.reference
        )

    def _kept(self, name: str, make: Callable[[], Router]) -> Router:
        """The folder's router of that name where the run resumes, else a new one, saved."""
        place = self.folder / "router" if self._single and name in self.agents else self.folder / "routers" / name
        if self.options.resume and (place / "router.json").is_file():
            return load_router(place).to(self.model.device)
        router = make()
        router.save_pretrained(place)
        return router

    def _learn(self, name: str, agent: Agent, progress: Progress) -> Router:
        total = self.options.total_decisions
        task = progress.add_task(f"train {name}", total=total, note="")
        events = self.folder / "tensorboard" / name
        shutil.rmtree(events, ignore_errors=True)  # an interrupted training's curve would lie under the new one
        journal = Journal(events)
        every = max(1, total // max(1, self.options.validations))

        def monitor(decisions: int, metrics: Mapping[str, float], router: Router) -> None:
            journal.scalars(decisions, metrics)
            progress.update(task, completed=decisions, note=f"return {metrics['rollout/return']:+.4f}")
            if decisions // every > (decisions - agent.decisions_per_update) // every:
                journal.scalars(decisions, self._validate(router))

        router = agent.learn(total, monitor)
        routes = measure(self.model, router, self.validation).routes
        journal.picture(total, "routes/share_of_big", heat_map(routes, f"{name} on held-out router text"))
        journal.hparams(_scalars(self.config), self._validate(router))
        journal.close()
        return router

    def _validate(self, router: Router) -> dict[str, float]:
        """Metrics on router text that no agent trains on; the evaluation split stays untouched until the end."""
        found = evaluate(self.model, router, self.validation, price=self.price, reference=self.options.reference)
        return {f"validation/{key}": value for key, value in found.items()}

    def _compare(self, learned: dict[str, Router], progress: Progress) -> tuple[Comparison, dict[str, Any]]:
        options, model = self.options, self.model
        task = progress.add_task("compare", total=3, note="train the supervised router")
        teach = {"price": self.price, "actions": options.actions, "seed": options.seed}
        imitate = partial(train_supervised, model, self.training, options=options.supervised, **teach)
        supervised = self._kept("supervised", imitate)
        progress.update(task, advance=1, note="train the soft router")
        soft = self._kept("soft", partial(train_soft, model, self.training, options=options.soft, **teach))
        progress.update(task, advance=1, note="measure on held-out text")
        comparer = _comparer(options, model, self.training, self.held_out, self.price)
        routers = {
            "random": RandomRouter(options.actions, options.seed),
            **{f"all-{action}": ConstantRouter(action) for action in ACTIONS},
            "best fixed": comparer.fixed,
            "supervised": supervised,
            "soft": soft,
            **learned,
            "oracle": comparer.oracle,
        }
        comparison = comparer.compare(routers, self._settings())
        progress.update(task, advance=1, note="")
        return comparison, comparer.traces(self.tokenizer)

    def _settings(self) -> dict[str, Any]:
        return {"command": _command(), "price": self.price, **yaml.safe_load(self.config)}

    def _say_where(self) -> None:
        routers = "router/ and routers/" if self._single else "routers/"
        console.print(
            f"\nwrote {self.folder}/: report.html, comparison.json and .csv, figures/, {routers}, config.yaml"
        )
        console.print(f"{_tensorboard()} --logdir {self.folder / 'tensorboard'}", soft_wrap=True)


def _lockstep(options: Namespace, model: DuoForCausalLM, training: Tensor, reward: Reward, **more: Any) -> Lockstep:
    """The tokens that a run's `env` options describe."""
    env = options.env
    return Lockstep(
        model,
        training,
        windows_per_batch=env.windows_per_batch,
        seed=options.seed,
        reward=reward,
        context=env.context,
        group_size=env.group_size,
        token_discount=env.token_discount,
        **more,
    )


def _command() -> str:
    """What repeats the run: what was typed, less the word to go on with it."""
    program = Path(sys.argv[0]).name
    typed = [word for word in sys.argv[1:] if word != "--resume"]
    return shlex.join([*(["python", program] if program.endswith(".py") else [program]), *typed])


def _comparer(options: Namespace, model: DuoForCausalLM, training: Tensor, held_out: Tensor, price: float) -> Comparer:
    return Comparer(
        model,
        training,
        held_out,
        price=price,
        actions=options.actions,
        reference=options.reference,
        options=options.evaluation,
    )


def write(comparison: Comparison, traces: dict[str, Any], folder: Path) -> None:
    """Print a comparison's table and write its numbers, its figure and its report."""
    console.print(table(comparison))
    comparison.save(folder)
    (folder / "comparison.md").write_text(markdown(comparison))
    figures = folder / "figures"
    figures.mkdir(exist_ok=True)
    frontier(comparison).savefig(figures / "frontier.png", dpi=150)
    (folder / "traces.json").write_text(json.dumps(traces))
    report.write(folder)


def check_folder(options: Namespace) -> None:
    """Refuse an output folder that already holds something, unless told what to do with it.

    Raises:
        FileExistsError: neither `overwrite` nor `resume` is set, or what would be overwritten is not a run.
        FileNotFoundError: there is nothing to resume.
    """
    folder = Path(options.out) if options.out else None
    held = folder is not None and folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    resume = options.get("resume", False)
    if resume and options.overwrite:
        raise ValueError("--resume goes on with what --overwrite would delete: give one of them")
    if resume and not held:
        raise FileNotFoundError(f"nothing to resume: --out {folder} holds no run")
    if folder is None or not held:
        return
    if not (options.overwrite or resume):
        raise FileExistsError(f"{folder} already holds files: give --overwrite to replace a run, or another --out")
    if not ((folder / _MARK).is_file() and (folder / "config.yaml").is_file()):
        raise FileExistsError(f"{folder} holds files but no run (no {_MARK}): give another --out")
    if Path.cwd().is_relative_to(folder.resolve()):
        raise FileExistsError(f"{folder} is where you stand: give another --out")


def _check_same_options(options: Namespace, config: str) -> None:
    """Refuse to resume a run with options other than its own: routers of different kinds would stand in one table."""
    if not options.resume:
        return
    now, then = (
        dict(flatten(yaml.safe_load(text))) for text in (config, (Path(options.out) / "config.yaml").read_text())
    )
    for name in sorted((now.keys() | then.keys()) - {"resume", "overwrite", "out"}):
        if now.get(name) != then.get(name):
            raise ValueError(
                f"{options.out} was made with {name} {then.get(name)}, not {now.get(name)}: cannot resume it"
            )


def make_folder(options: Namespace, name: str, config: str) -> Path:
    """The output folder, emptied where it is overwritten, with the resolved configuration in it."""
    folder = Path(options.out) if options.out else _free_folder(name)
    if options.overwrite and folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MARK).touch()
    (folder / "config.yaml").write_text(config)
    return folder


def _free_folder(name: str) -> Path:
    return next(folder for n in count(1) if not (folder := Path("runs") / f"{name}-{n}").exists())


def _hold_back(windows: Tensor) -> tuple[Tensor, Tensor]:
    """Router-training text without its last windows, and those, on which training is only watched."""
    held = min(_VALIDATION_WINDOWS, len(windows) // 8)
    if held == 0:
        raise ValueError(f"the router split has {len(windows)} windows, too few to learn on: give more text")
    return windows[:-held], windows[-held:]


def _scalars(config: str) -> dict[str, str | float | bool]:
    """The leaves of a YAML configuration by dotted name, for TensorBoard's table of hyper-parameters."""
    return {key: value for key, value in flatten(yaml.safe_load(config)) if isinstance(value, (str, int, float))}


def _progress() -> Progress:
    columns = ("{task.description}", BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), "{task.fields[note]}")
    return Progress(*columns, console=console)


def _tensorboard() -> str:
    """TensorBoard's command as it can be typed here, whether or not the virtual environment is activated."""
    return "tensorboard" if shutil.which("tensorboard") else str(Path(sys.executable).with_name("tensorboard"))


def evaluate_command(options: Namespace, config: str) -> Callable[[], None]:
    """Prepare `duorl evaluate`."""
    action_ids(options.actions)
    price = LossImprovement(options.price).price
    model, tokenizer = load(options.model, skip=options.skip), load_tokenizer(options.model)
    router = load_router(options.router).to(model.device)
    require_positive(window=options.window)
    counts = options.evaluation.fixed_windows, options.evaluation.reference_windows
    check_searches(model, options.window, options.actions, *counts)
    read = partial(load_windows, options.corpus, tokenizer, length=options.window)
    training, held_out = read(split="router"), read(split="evaluation")
    measure(model, router, held_out[:1])  # a router of another model's sizes fails here
    check_folder(options)

    def run() -> None:
        comparer = _comparer(options, model, training, held_out, price)
        routers = {f"{options.router}": router, "best fixed": comparer.fixed, "oracle": comparer.oracle}
        comparison = comparer.compare(routers, {"command": _command(), **yaml.safe_load(config)})
        folder = make_folder(options, "evaluate", config)
        write(comparison, comparer.traces(tokenizer), folder)
        console.print(f"wrote {folder}/: report.html, comparison.json and .csv, figures/")

    return run


def oracle_command(options: Namespace, config: str) -> Callable[[], None]:
    """Prepare `duorl oracle`."""
    require_positive(window=options.window, windows=options.windows)
    model, tokenizer = load(options.model, skip=options.skip), load_tokenizer(options.model)
    routes = count_routes(model.num_layers, options.actions)
    tokens = load_windows(options.corpus, tokenizer, split="evaluation", length=options.window)[: options.windows]
    states_within(options.memory_limit, model, len(tokens), options.window, routes)
    LossImprovement(options.price)
    check_folder(options)

    def run() -> None:
        found = exhaustive(
            model,
            tokens,
            context=options.context,
            actions=options.actions,
            price=options.price,
            memory_limit=options.memory_limit,
        )
        # A committed context belongs to one budget: other budgets' routes in it are not what anybody deploys.
        rows = found.by_budget() if found.committed is None else []
        best = found.best(options.price)
        lucky = found.best_of_random(100, generator=torch.Generator().manual_seed(options.seed), price=options.price)
        title = f"{options.context} context, {lucky.numel():,} held-out tokens"
        console.print(budget_table(rows, title) if rows else title)
        random_loss, best_loss = (found.loss(index).mean().item() for index in (lucky, best))
        spent = found.compute[best].mean().item()
        console.print(
            f"per token, at price {options.price:g}: oracle {best_loss:.4f} at compute {spent:.3f}, "
            f"best of 100 random {random_loss:.4f}"
        )
        folder = make_folder(options, "oracle", config)
        numbers = {
            "settings": yaml.safe_load(config),
            "rows": rows,
            "oracle": best_loss,
            "oracle_compute": spent,
            "best_of_100_random": random_loss,
        }
        (folder / "oracle.json").write_text(json.dumps(numbers, indent=1))
        if {"small", "big"} <= set(options.actions):
            difficulty = token_difficulty(found, tokens, tokenizer, price=options.price)
            save_table(difficulty, folder / "tokens.csv")
            save_table(difficulty, folder / "tokens.parquet")
            settings = {"command": _command(), **yaml.safe_load(config)}
            page = report.text_page("Token difficulty", settings, [row._asdict() for row in difficulty])
            (folder / "difficulty.html").write_text(page)
        console.print(f"wrote {folder}/: " + ", ".join(sorted(path.name for path in folder.glob("*.*"))))

    return run


class Paper:
    """`duorl paper`: everything that can be wrong with the input is found before a folder is made.

    Args:
        options: `PaperOptions` and the folder flags.
        config: the resolved options as YAML.
    """

    def __init__(self, options: Namespace, config: str):
        self.options, self.config = options, config
        check_folder(options)
        require_positive(total_decisions=options.total_decisions)
        if options.env.window < _LEAST_WINDOW:
            raise ValueError(
                f"env.window must be at least {_LEAST_WINDOW} tokens for a study, not {options.env.window}"
            )
        self.sources = {"prose": source_names(options.prose), "code": source_names(options.code)}
        named = [", ".join(names) for names in self.sources.values()]
        kept = dense.find(options.dense, model_folder(options.model), named)
        self.dense = [] if options.quick else kept
        self.model, self.tokenizer = load(options.model, skip=options.skip), load_tokenizer(options.model)
        read = partial(load_windows, tokenizer=self.tokenizer, length=options.env.window)
        self.training = read([name for names in self.sources.values() for name in names], split="router")
        self.texts = {name: read(names, split="evaluation") for name, names in self.sources.items()}
        self.size = StudySize.quick() if options.quick else options.size
        for name, windows in self.texts.items():
            if len(windows) < 2:
                raise ValueError(f"{name}: a study needs at least 2 windows of evaluation text: give more")
        counts = min(self.size.windows, max(map(len, self.texts.values()))), self.size.pattern_windows
        check_searches(self.model, options.env.window, ("small", "big"), *counts)
        self.soft = replace(options.soft, updates=_QUICK_UPDATES) if options.quick else options.soft
        self.total_decisions = _QUICK_DECISIONS if options.quick else options.total_decisions
        for factory in options.agents.values():
            for price in self.size.prices:
                self._lockstep_agent(factory, price)

    def __call__(self) -> None:
        """Measure, draw, and write claims.md and report.html."""
        folder = make_folder(self.options, "paper", self.config)
        with console.status("") as status:
            figures = self._measure(folder, status.update)
        draw(figures, folder)
        settings = {"command": _command(), **yaml.safe_load(self.config)}
        (folder / "settings.json").write_text(json.dumps(settings, indent=1))
        page = claims_page(figures, model=self.options.model, command=_command())
        (folder / "claims.md").write_text(page)
        report.write(folder)
        console.print(f"wrote {folder}/: figure-*.png and .json, claims.md, report.html")
        if not any(name.startswith("8") for name in figures):
            console.print("Figure 8 is left out: no dense.json; make it with duorl dense and give --dense")

    def _measure(self, folder: Path, progress: Callable[[str], None]) -> dict[str, Any]:
        study = Study(
            self.model,
            self.tokenizer,
            self.training,
            self.texts,
            learners={name: partial(self._learn, factory) for name, factory in self.options.agents.items()},
            soft=self.soft,
            size=self.size,
            seed=self.options.seed,
            progress=progress,
        )
        figures = study.run()
        if self.options.quick:
            progress("figure 8: small models of its own")
            with contextlib.redirect_stdout(io.StringIO()):  # the Trainer prints its log
                self.dense = dense.quick(folder / "dense", self.sources, self.options.seed)
        return figures | scaling(self.dense, {name: ", ".join(names) for name, names in self.sources.items()})

    def _learn(self, factory: AgentFactory, price: float) -> Router:
        return self._lockstep_agent(factory, price).learn(self.total_decisions)

    def _lockstep_agent(self, factory: AgentFactory, price: float) -> Agent:
        return factory(_lockstep(self.options, self.model, self.training, LossImprovement(price)))


_QUICK_UPDATES, _QUICK_DECISIONS = 40, 200_000
_LEAST_WINDOW = 8


def report_command(options: Namespace, config: str) -> Callable[[], None]:
    """Prepare `duorl report`."""
    folder = Path(options.run)
    report.page(folder)
    return lambda: console.print(f"wrote {report.write(folder)}")


def dense_command(options: Namespace, config: str) -> Callable[[], None]:
    """Prepare `duorl dense`."""
    check_folder(options)
    _check_same_options(options, config)
    fields = {name: getattr(options, name) for name in DenseOptions.__dataclass_fields__}
    settings = DenseOptions(**fields)
    first = dense.plan(settings.recipe, settings.shares, Path())["duo"]
    tokenizer = Pretraining(first).tokenizer  # the recipe and its text are found good
    for text in settings.texts:
        dense.evaluation_windows(text, tokenizer, settings)

    def run() -> None:
        folder = make_folder(options, "dense", config)
        dense.train(dense.plan(settings.recipe, settings.shares, folder), settings.processes)
        rows = dense.measure_all(settings, folder)
        numbers = {"settings": {"command": _command(), **yaml.safe_load(config)}, "rows": rows}
        (folder / "dense.json").write_text(json.dumps(numbers, indent=1))
        (folder / "dense.md").write_text(dense.markdown(rows))
        console.print(Markdown(dense.markdown(rows)))
        console.print(f"wrote {folder}/: dense.json, dense.md, and a folder for each model")

    return run


def pretrain_command(options: Namespace, config: str) -> Callable[[], None]:
    """Prepare `duorl pretrain`."""
    check_folder(options)
    fields = {name: getattr(options, name) for name in PretrainOptions.__dataclass_fields__}
    job = Pretraining(PretrainOptions(**fields), resume=options.resume)

    def run() -> None:
        folder = make_folder(options, "pretrain", config)
        job.run()
        console.print(f"wrote {folder}/: load it with --model {folder}")

    return run


# What preparing a command may raise for its input; running it is outside, where an error is a bug and keeps its trace.
_BAD_INPUT = (ValueError, OSError, KeyError, TypeError, AssertionError, ZeroDivisionError, RuntimeError)

COMMANDS: dict[str, Callable[[Namespace, str], Callable[[], None]]] = {
    "train": Run,
    "compare": Run,
    "evaluate": evaluate_command,
    "oracle": oracle_command,
    "paper": Paper,
    "report": report_command,
    "dense": dense_command,
    "pretrain": pretrain_command,
}


def build_parser(without: Collection[str] = ()) -> tuple[_Parser, dict[str, _Parser]]:
    """The whole command line, and its subcommands' parsers by name.

    Args:
        without: `agent`, `reward`: those that get no default.
    """
    subparsers = {
        "train": _subparser(RunOptions, skip={"agents"}),
        "compare": _subparser(RunOptions),
        "evaluate": _subparser(EvaluateOptions),
        "oracle": _subparser(OracleOptions),
        "paper": _subparser(PaperOptions),
        "report": _report_parser(),
        "dense": _subparser(DenseOptions),
        "pretrain": _subparser(PretrainOptions),
    }
    agent = None if "agent" in without else PPO
    subparsers["train"].add_argument("--agent", type=AgentFactory, default=agent, help="the learner, PPO or REINFORCE")
    reward = None if "reward" in without else lazy_instance(LossImprovement, price=DEFAULT_PRICE)
    for name in ("train", "compare"):
        subparsers[name].set_defaults({"reward": reward})
    for name in ("train", "compare", "dense", "pretrain"):
        subparsers[name].add_argument(
            "--resume", action="store_true", help="keep what the output folder has finished, do the rest"
        )
    subparsers["paper"].add_argument(
        "--quick",
        action="store_true",
        help="few windows, short trainings, Fig. 8 on small models: says little, in minutes",
    )
    parser = _Parser(prog="duorl", description="Reinforcement-learning routers for duo models.", allow_abbrev=False)
    commands = parser.add_subcommands()
    for name, subparser in subparsers.items():
        commands.add_subcommand(name, subparser, help=subparser.description)
    return parser, subparsers


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; bad input ends in one line on standard error and exit code 2."""
    keep_freed_memory()
    sys.path.insert(0, os.getcwd())  # a reward named by import path may lie where the user stands
    transformers.logging.disable_progress_bar()
    parser, subparsers = build_parser()
    parsed = parser.parse_args(arguments)
    name = parsed.subcommand
    # The parser carries a default class's options over to the class that replaces it, PPO's learning rate to REINFORCE.
    if replaced := _replaced(parsed[name], subparsers[name].get_defaults()):
        parser, subparsers = build_parser(without=replaced)
        parsed = parser.parse_args(arguments)
    text = subparsers[name].dump(parsed[name], skip_none=False)
    try:
        options = parser.instantiate(parsed)[name]
        command = COMMANDS[name](options, text)
    except _BAD_INPUT as error:
        fail(" ".join(f"{type(error).__name__}: {error}".removeprefix("ValueError: ").split()))
    command()


def _replaced(parsed: Namespace, defaults: Namespace) -> list[str]:
    """Which of agent and reward are of another class than the default's."""
    both = [key for key in ("agent", "reward") if parsed.get(key) and defaults.get(key)]
    return [key for key in both if parsed[key].class_path != defaults[key].class_path]


def train_main() -> None:
    """`python train.py ...` is `duorl train ...`."""
    main(["train", *sys.argv[1:]])
