"""The HTML report of a comparison or of a paper run: one page that needs no other file and no network.

from duorl.reports import page
page.write(Path("runs/compare"))     # reads the run's JSON files, writes report.html beside them
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from duorl.files import write_text
from duorl.reports.charts import Numbers, both_colourings, document
from duorl.reports.comparison import comparison_page
from duorl.reports.study import study_page


def page(folder: Path) -> str:
    """The page of the run in a folder.

    Raises:
        FileNotFoundError: there is no run, or one of its files is missing.
        ValueError: a file is not JSON.
    """
    if not any((folder / name).is_file() for name in ("comparison.json", "settings.json")):
        raise FileNotFoundError(f"no run in {folder}: neither comparison.json nor a paper run's settings.json is there")
    return comparison_page(folder) if (folder / "comparison.json").is_file() else study_page(folder)


def write(folder: Path) -> Path:
    """Write `report.html` for the run in a folder, and return its path; errors as for `page`."""
    path = folder / "report.html"
    write_text(path, page(folder))
    return path


def text_page(title: str, settings: Numbers, rows: Sequence[Numbers]) -> str:
    """A page with coloured text, without charts."""
    return document(title, settings, [both_colourings(rows)], charts=False)
