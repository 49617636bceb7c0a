"""Runs a command: first the cheap checks, then the checks of the command, then its work in a folder."""

from __future__ import annotations

import io
import logging
import math
import sys
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from jsonargparse import Namespace

from duorl import ranks
from duorl.checks import BadInput, in_words, require_positive, require_seed
from duorl.cli.commands import COMMANDS, fail
from duorl.cli.console import Terminal, resume_command, say_logdir
from duorl.cli.parser import complete, parse
from duorl.experiments.reading import check_read
from duorl.experiments.voice import speaking
from duorl.files import is_no_room
from duorl.runs import folders, interrupts
from duorl.runs.allocator import keep_freed_memory


def run_command(name: str, words: list[str]) -> None:
    """Parse, check, prepare and run a command.

    Args:
        name: name of the command.
        words: the words after it.

    Raises:
        SystemExit: 2 for bad input, 1 for a run that failed, 130 and 143 for a run that was stopped.
    """
    keep_freed_memory()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every try to reach the hub
    with ExitStack() as stack:
        folder: Path | None = None
        _connect(name, stack)
        try:
            stack.enter_context(interrupts.listening())
            stack.enter_context(speaking(Terminal()))
            try:
                options, config = parse(name, words)
                _require_same(config)
                values = yaml.safe_load(config) or {}
                check_cheaply(name, options, config, values)
                if options.get("threads") is not None:
                    torch.set_num_threads(options.threads)
                from duorl.models.gateway import quieten  # here, because it imports transformers

                quieten()
                called, work = import_module(COMMANDS[name].module).prepare(options, values)
                if "overwrite" in COMMANDS[name].flags:
                    claimed = stack.enter_context(_claimed(called, options, config)) if ranks.first() else Path()
                    folder = Path(ranks.of_first(str(claimed)))
            except Exception as error:  # of the input; running is outside, where an error is a bug and keeps its trace
                fail(in_words(error))
            _work(name, work, folder)
            if folder is not None and (folder / "tensorboard").is_dir() and ranks.first():
                say_logdir(folder)
        except interrupts.Interrupted as stop:
            _say_stopped(name, folder)
            raise SystemExit(stop.exit_code) from None


def _connect(name: str, stack: ExitStack) -> None:
    """Connect the ranks, if there are several; all but the first are silent."""
    if ranks.count() == 1:
        return
    if "ranks" not in COMMANDS[name].flags:
        able = ", ".join(name for name, command in COMMANDS.items() if "ranks" in command.flags)
        fail(f"{name} runs in one process, not under torchrun or accelerate launch; several ranks can do {able}")
    ranks.connect()
    if not ranks.first():
        stack.enter_context(redirect_stdout(io.StringIO()))


def _require_same(config: str) -> None:
    """Refuse ranks that were started with different options; one that differs from rank 0 says in which.

    Raises:
        SystemExit: on all ranks.
    """
    first = ranks.of_first(config)
    if config != first:
        own, other = (dict(folders.flatten(yaml.safe_load(text))) for text in (config, first))
        option = min(name for name in own.keys() | other.keys() if own.get(name) != other.get(name))
        said = f"rank {ranks.rank()} was started with {option} {own.get(option)}, rank 0 with {other.get(option)}"
        print(f"duorl: error: {said}: give all the same options", file=sys.stderr)
    if ranks.any_of(config != first):
        raise SystemExit(2)


def check_cheaply(name: str, options: Namespace, config: str, values: dict[str, Any]) -> None:
    """Check everything that can be checked before anything is loaded.

    Raises:
        ValueError, OSError: the folder, the model or a text cannot be used.
    """
    _require_finite(values)
    if "seed" in options:
        require_seed(options.seed)
    if options.get("threads") is not None:
        require_positive(threads=options.threads)
    resume = options.get("resume", False)
    if "overwrite" in COMMANDS[name].flags and ranks.first():
        folders.check(options.out, resume=resume, overwrite=options.overwrite)
    if resume and ranks.first():
        folders.check_same_options(options.out, config, partial(complete, name))
    check_read(name, values)


def _require_finite(values: dict[str, Any]) -> None:
    """Refuse options that are NaN or infinite."""
    for name, value in folders.flatten(values):
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{name} must be a finite number, not {number}")


def _claimed(called: str, options: Namespace, config: str):
    resume = options.get("resume", False)
    return folders.claim(options.out, called, config, resume=resume, overwrite=options.overwrite)


def _work(name: str, work: Callable[[Path | None], None], folder: Path | None) -> None:
    """Do the work. If it fails and cannot be resumed, its folder can be used again."""
    from duorl.experiments.trainings import JobsFailed
    from duorl.routers.fit import UnusableRouter

    resumable = "resume" in COMMANDS[name].flags
    try:
        work(folder)
    except BaseException as error:
        if folder is not None and not resumable:
            folders.abandon(folder)
        if isinstance(error, BadInput):
            fail(str(error))
        if isinstance(error, JobsFailed):
            _fail_and_hint(str(error), folder)
        if isinstance(error, UnusableRouter):
            fail(f"{folder}: {error}", code=1)
        if is_no_room(error):
            _fail_and_hint(f"the disk is full: {in_words(error)}", folder if resumable else None)
        if isinstance(error, PermissionError):
            _fail_and_hint(in_words(error), folder if resumable else None)
        raise


def _fail_and_hint(line: str, folder: Path | None) -> NoReturn:
    fail(line if folder is None else f"{line}; go on with: {resume_command(folder)}", code=1)


def _say_stopped(name: str, folder: Path | None) -> None:
    if folder is None or "resume" not in COMMANDS[name].flags:
        print("duorl: stopped; nothing is kept", file=sys.stderr)
    else:
        print(f"duorl: stopped; go on with: {resume_command(folder)}", file=sys.stderr)
