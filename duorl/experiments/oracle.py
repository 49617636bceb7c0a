"""`duorl oracle`: the routes of held-out tokens, searched in shards."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from duorl.checks import require_positive
from duorl.evaluation import (
    RouteSearchOptions,
    RouteSearchPlan,
    choose_starts,
    flops_per_second,
    plan_route_search,
    search_windows,
    summarize,
)
from duorl.evaluation.columns import joined_columns, save_columns
from duorl.evaluation.difficulty import TokenRow, named_rows, save_table
from duorl.evaluation.route_search import starts_count
from duorl.experiments.built import again
from duorl.experiments.material import Material
from duorl.experiments.trainings import Workers
from duorl.experiments.voice import command, say, show
from duorl.files import write_json, write_text, writing
from duorl.prices import check_price
from duorl.reports import page
from duorl.reports.figures import budget_table
from duorl.runs import interrupts
from duorl.runs.jobs import RESULT, Job, Tell

_SHARD = "found.safetensors"


def prepare(options: Namespace, config: dict[str, Any]) -> tuple[str, Callable[[Path], None]]:
    """The default name of the folder, and what searches the routes in it.

    Raises:
        ValueError, OSError: the input cannot be used, or the search is impossible.
    """
    require_positive(windows=options.windows, shard=options.shard)
    check_price(options.price)
    search = Search(options)
    plan = plan_route_search(search.model, search.tokens, search.asked)
    workers = Workers("oracle", options, config, search.model, search.model.device, most=len(search.shards))
    return "oracle", partial(_run, search, plan, workers, config)


class Search:
    """What every shard needs.

    Args:
        options: `OracleOptions`.
    """

    def __init__(self, options: Namespace):
        material = Material.of(options, options.window)
        self.model, self.tokenizer = material.model, material.tokenizer
        self.text = material.read(options.corpus, split="evaluation").tokens
        self.tokens = self.text[: options.windows]
        edges = [*range(0, len(self.tokens), options.shard), len(self.tokens)]
        self.shards = list(pairwise(edges))  # the windows from one edge up to the next
        self.asked = RouteSearchOptions(
            method=options.method,
            context=options.context,
            actions=tuple(options.actions),
            price=options.price,
            memory_limit=options.memory_limit,
            seed=options.seed,
        )

    def starts(self, tell: Tell) -> dict[str, Any]:
        """Choose the patterns with which a descent starts: the function of a job."""
        most = starts_count(self.model, self.asked)

        def tried(count: int) -> None:
            tell(completed=count, total=most, note="patterns to start from")
            interrupts.check()

        return {"starts": choose_starts(self.model, self.text, self.asked, tried)}

    def shard(self, first: int, last: int, method: str, starts: Path, place: Path, tell: Tell) -> dict[str, Any]:
        """Search the windows from `first` up to `last`: the function of a job.

        Args:
            first: number of the first window.
            last: number of the window after the last one.
            method: that of the plan.
            starts: folder of the job of `starts`; not there if the method needs none.
            place: folder for what is found.
            tell: called at the start.
        """
        tell(note=f"{last - first} windows")
        patterns = json.loads((starts / RESULT).read_text())["starts"] if method == "descent" else []
        with interrupts.immediate():
            found = search_windows(self.model, self.text[first:last], self.asked, method, patterns)
        save_columns(found, place / _SHARD)
        return {"windows": last - first}


def shard_apart(run: Path, tell: Tell, **arguments: Any) -> dict[str, Any]:
    """Search the windows of a shard in another process."""
    return _search(run).shard(tell=tell, **arguments)


def starts_apart(run: Path, tell: Tell) -> dict[str, Any]:
    """Choose the patterns with which a descent starts in another process."""
    return _search(run).starts(tell)


@lru_cache(maxsize=1)
def _search(run: Path) -> Search:
    return Search(again("oracle", run)[0])


def _jobs(search: Search, method: str, workers: Workers, folder: Path) -> tuple[list[Job], list[Job]]:
    """What is done before the shards, and the shards. Their names say the windows, whose number can grow."""
    starts = Job("starts", folder / "shards" / "starts", search.starts)
    before = [workers.placed(starts, starts_apart, folder)] if method == "descent" else []
    shards = []
    for first, last in search.shards:
        place = folder / "shards" / f"{method}-{first:05}-{last:05}"
        arguments = {"first": first, "last": last, "method": method, "starts": starts.place, "place": place}
        job = Job(place.name, place, search.shard, arguments, after=tuple(job.name for job in before))
        shards.append(workers.placed(job, shard_apart, folder))
    return before, shards


def _run(search: Search, plan: RouteSearchPlan, workers: Workers, config: dict[str, Any], folder: Path) -> None:
    say(plan.text(flops_per_second(search.model, search.tokens)))
    before, shards = _jobs(search, plan.method, workers, folder)
    workers.finish([*before, *shards], folder)
    columns = joined_columns([job.place / _SHARD for job in shards])
    found = summarize(search.model, search.tokens, search.tokenizer, search.asked, plan.method, columns)
    show(budget_table(found.rows, found.title) if found.rows else found.title)
    say(found.summary)
    write_json(folder / "oracle.json", {"settings": config, **found.numbers})
    if found.difficulty:
        title = (
            "Token difficulty" if found.exact else f"Token difficulty, at least: the routes are those of {found.method}"
        )
        settings = {"command": command(), **config}
        _write_difficulty(found.difficulty, found.exact, title, settings, folder)
    say(f"wrote {folder}/: " + ", ".join([*sorted(path.name for path in folder.glob("[!.]*.*")), "shards/"]))


def _write_difficulty(rows: list[TokenRow], exact: bool, title: str, settings: dict, folder: Path) -> None:
    for ending in ("csv", "parquet"):
        with writing(folder / f"tokens.{ending}") as beside:
            save_table(rows, beside, exact=exact)
    text = page.text_page(title, settings, named_rows(rows, exact=exact))
    write_text(folder / "difficulty.html", text)
