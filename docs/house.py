"""Draws the house from the code's own imports: docs/results/house.svg, which CONTRIBUTING.md shows.

    python docs/house.py

A box is a part of the package. It stands above everything that it imports. A line leads to a part that it imports, if
no part between the two does.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "results" / "house.svg"
BOX, GAP, ROW = (92, 24), 12, 74  # pixels


def parts() -> dict[str, set[str]]:
    """For every part of the package, the parts that it imports."""
    found: dict[str, set[str]] = {}
    for folder in ("duorl", "envs", "agents"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if part := part_of(path):
                found.setdefault(part, set()).update(imported(ast.parse(path.read_text())) - {part})
    return {part: others & found.keys() for part, others in found.items()}


def part_of(path: Path) -> str | None:
    """The part of the package that a file belongs to; None outside of the package."""
    names = path.relative_to(ROOT).with_suffix("").parts
    if names[0] in ("envs", "agents"):
        return names[0]
    return names[1] if names[0] == "duorl" and len(names) > 1 and names[1] != "__init__" else None


def imported(tree: ast.AST) -> set[str]:
    """Parts of the package that a module imports, anywhere in it."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names |= {f"duorl.{alias.name}" for alias in node.names} if node.module == "duorl" else {node.module}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("duorl.")}


def draw() -> str:
    """The picture as SVG."""
    known = parts()

    @cache
    def floor(part: str) -> int:
        return max((floor(other) + 1 for other in known[part]), default=0)

    floors: dict[int, list[str]] = {}
    for part in sorted(known):
        floors.setdefault(floor(part), []).append(part)
    top, width = max(floors), max(map(len, floors.values())) * (BOX[0] + GAP)
    places = {}
    for height, row in floors.items():
        left = (width - len(row) * (BOX[0] + GAP)) / 2
        for number, part in enumerate(row):
            places[part] = (left + number * (BOX[0] + GAP), (top - height) * ROW + GAP)
    lines = [_line(places[part], places[other]) for part in sorted(known) for other in sorted(_near(part, known))]
    boxes = [_box(part, *places[part]) for part in sorted(known)]
    size = f'width="{width}" height="{(top + 1) * ROW}"'
    style = 'font-family="sans-serif" font-size="12" text-anchor="middle"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>', *lines, *boxes, "</svg>\n"])


def _near(part: str, known: dict[str, set[str]]) -> set[str]:
    """What a part imports, without what the others among these import already."""

    @cache
    def below(name: str) -> frozenset[str]:
        return frozenset(known[name]).union(*(below(other) for other in known[name]))

    return known[part] - set().union(*(below(other) for other in known[part]))


def _line(above: tuple[float, float], under: tuple[float, float]) -> str:
    x, y = above[0] + BOX[0] / 2, above[1] + BOX[1]
    return f'<line x1="{x:.0f}" y1="{y:.0f}" x2="{under[0] + BOX[0] / 2:.0f}" y2="{under[1]:.0f}" stroke="#9aa4c8"/>'


def _box(part: str, x: float, y: float) -> str:
    box = f'<rect x="{x:.0f}" y="{y:.0f}" width="{BOX[0]}" height="{BOX[1]}" rx="4" fill="#e8eaf6" stroke="#3f51b5"/>'
    return f'{box}<text x="{x + BOX[0] / 2:.0f}" y="{y + 16:.0f}">{part}</text>'


if __name__ == "__main__":
    PICTURE.write_text(draw())
