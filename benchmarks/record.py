"""What a benchmark found, beside the command that found it."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from duorl.files import write_json


def record(path: Path, **found: Any) -> None:
    """Write what was found as JSON, with the command as it was typed."""
    command = ["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]
    write_json(path, {"command": shlex.join(command), **found})
