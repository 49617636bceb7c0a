"""`duorl report`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jsonargparse import Namespace

from duorl.cli.console import say
from duorl.reports import page


def prepare(options: Namespace, config: dict) -> tuple[str, Callable[[Path], None]]:
    """The folder, and the function that writes the page; see `duorl.reports.page.page` for the errors."""
    run = Path(options.run)
    try:
        page.page(run)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"cannot read the run in {run}: {type(error).__name__}: {error}") from error
    return "", lambda folder: say(f"wrote {page.write(run)}")
