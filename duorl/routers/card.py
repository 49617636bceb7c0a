"""The card of a saved router, `README.md`: what it was trained for, and what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from duorl import markdown
from duorl.files import write_json, write_text

_TEXT = """---
library_name: duorl
tags: [duorl, router]
---

# {name}

A router of DuoRL: for every token and layer of a duo model it decides which feed-forward network runs.

{facts}
Load it with `duorl.routers.load`, use it with `model.generate(ids, router=router)`, or measure it on your text with
`duorl evaluate --router FOLDER`.
"""


def describe(folder: str | Path, facts: dict[str, Any]) -> None:
    """Add facts to a saved router, and write its card.

    Args:
        folder: of a saved router.
        facts: see `card`; those that the router already has stay, unless they are given again.
    """
    path = Path(folder) / "router.json"
    described = json.loads(path.read_text(encoding="utf8"))
    facts = {**described.get("facts", {}), **facts}
    write_json(path, {**described, "facts": facts})
    write_text(path.with_name("README.md"), card(described, facts))


def card(described: dict[str, Any], facts: dict[str, Any]) -> str:
    """A router's card.

    Args:
        described: what `router.json` holds.
        facts: JSON values by name; lists of objects are shown as tables. `name` is the title.
    """
    known = {"model": (described.get("model") or {}).get("name"), "class": described["router"], **facts}
    name = known.pop("name", described["router"])
    return _TEXT.format(name=name, facts=markdown.facts({key: value for key, value in known.items() if value}))
