"""`duorl report`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jsonargparse import Namespace

from duorl.cli.console import say
from duorl.reports import page


def prepare(options: Namespace, config: str) -> tuple[str, Callable[[Path], None]]:
    """The folder, and the function that writes the page; see `duorl.reports.page.page` for the errors."""
    run = Path(options.run)
    page.page(run)
    return "", lambda folder: say(f"wrote {page.write(run)}")
