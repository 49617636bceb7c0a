"""Pages of the site that are made from the code: all commands with their options, and the public names in Python.

A hook of mkdocs (mkdocs.yml names it). Nothing of this is written down twice, so it cannot drift from the code.
"""

from __future__ import annotations

import inspect
import re
from argparse import Action
from collections.abc import Iterator
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import duorl
from duorl.cli.commands import COMMANDS
from duorl.cli.parser import build_parser
from duorl.markdown import grid

PYTHON = "reference/python"
PARTS_OF_COMMANDS = {"cli", "reports", "runs"}  # public for our own packages, and no interface for users
_PAGE = re.compile(r"docs/([\w/-]+)\.md")
_OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+(?!tutorials|how-to|reference|explanation|results)[^)]*\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = {"reference/commands.md": commands(), **dict(python())}
    for place, text in pages.items():
        files.append(File.generated(config, place, content=text))
    return files


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages of the packages into the navigation, where mkdocs.yml names their folder."""
    assert config.nav is not None
    reference = next(entry["Reference"] for entry in config.nav if "Reference" in entry)
    place = next(entry for entry in reference if entry.get("Python"))
    place["Python"] = [{page.removesuffix(".md").split("/")[-1]: page} for page, _ in python()]
    return config


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A link to a file of the repository that is not in the site becomes the file's name."""
    return _OUTSIDE.sub(r"`\1`", markdown)


def commands() -> str:
    """The page of all commands."""
    parts = ["# Commands", "Every option is a flag, and a key in YAML with the same name (`--config FILE`)."]
    for name, command in COMMANDS.items():
        parser = build_parser(name)
        parts += [f"## duorl {name}", command.summary]
        for group in parser._action_groups:
            rows = [_row(action) for action in group._group_actions if _is_option(action)]
            if rows:
                parts += [grid(("option", "default", "meaning"), rows)]
    return "\n\n".join(parts)


def _is_option(action: Action) -> bool:
    return not any(name.endswith((".help", "--help", "--print_config")) for name in action.option_strings or ["--help"])


def _row(action: Action) -> list[str]:
    default = action.default
    shown = "" if default is None or default is False or default == "==SUPPRESS==" else f"`{_plain(default)}`"
    meaning = _PAGE.sub(r"[\1](../\1.md)", " ".join((action.help or "").split()).replace("|", "\\|"))
    return [f"`{action.option_strings[0]}`", shown, meaning]


def _plain(value: Any) -> str:
    if isinstance(value, dict) and "class_path" in value:
        value = value["class_path"]
    return str(value).replace("|", "\\|")


def python() -> Iterator[tuple[str, str]]:
    """For each public package, its page's place and text."""
    own = [name for name in duorl.__all__ if not inspect.ismodule(getattr(duorl, name))]
    yield f"{PYTHON}/duorl.md", _reference("duorl", own)
    for name in sorted(set(duorl.__all__) - set(own) - PARTS_OF_COMMANDS):
        module = getattr(duorl, name)
        yield f"{PYTHON}/{name}.md", _reference(f"duorl.{name}", getattr(module, "__all__", None))


def _reference(module: str, names: list[str] | None) -> str:
    title = f"# {module}\n\n"
    if names is None:
        return f"{title}::: {module}\n    options:\n      show_root_heading: false\n"
    return title + "\n\n".join(f"::: {module}.{name}" for name in names)
