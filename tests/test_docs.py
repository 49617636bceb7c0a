"""The examples in README and docs run, and the commands in them exist."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import acceptance, bench, credit, decode, drafts, groups, later, prices, recipes, sizes, soak
from duorl.cli import COMMANDS
from duorl.cli.parser import parse
from duorl.evaluation.compare import Comparison
from duorl.models.loading import EMBEDDED
from duorl.paper import claims_page
from duorl.paper.dense import markdown as markdown_of_dense
from duorl.reports.figures import budgets_markdown, markdown

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
GENERATED = re.compile(r"docs/reference/(commands|python/\w+)\.md")  # tests/test_site.py builds them
PAGES = [ROOT / "README.md", *sorted(path for path in DOCS.rglob("*.md") if "results" not in path.parts)]
BENCHMARKS = [
    ("acceptance", acceptance, "explanation/drafts.md"),
    ("acceptance-smollm2", acceptance, "explanation/drafts.md"),
    ("acceptance-smollm2-long", acceptance, "explanation/drafts.md"),
    ("drafts", drafts, "explanation/drafts.md"),
    ("drafts-smollm2", drafts, "explanation/drafts.md"),
    ("credit", credit, "explanation/learning.md"),
    ("credit-smollm2", credit, "explanation/learning.md"),
    ("groups", groups, "explanation/performance.md"),
    ("groups-cpu", groups, "explanation/performance.md"),
    ("decode", decode, "explanation/speed.md"),
    ("decode-1b", decode, "explanation/speed.md"),
    ("decode-smollm2", decode, "explanation/speed.md"),
    ("recipes-smollm2", recipes, "explanation/small-networks.md"),
    ("later-smollm2", later, "explanation/learning.md"),
    ("prices", prices, "how-to/budgets.md"),
    ("soak", soak, "how-to/interruptions.md"),
]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def commands(page: Path) -> list[str]:
    """Lines that start with one of our commands, fenced or indented."""
    lines = re.findall(r"^(?: {4})?((?:python train\.py|duorl) .*)$", page.read_text(), re.MULTILINE)
    return [line.split("  #")[0] for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_examples_run(page, tmp_path):
    """All of a page's blocks as one program, in an empty folder."""
    program = "\n".join(blocks(page, "python"))
    (tmp_path / "example.py").write_text(program)
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_accepted(page, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "thrifty.py").write_text(blocks(DOCS / "tutorials" / "own-reward.md", "python")[0])
    monkeypatch.chdir(ROOT)
    for command in commands(page):
        words = shlex.split(command)
        words = ["train", *words[2:]] if words[0] == "python" else words[1:]
        assert parse(words[0], words[1:])[1]


def test_the_readme_names_every_command():
    named = {command.split()[1].replace("train.py", "train") for command in commands(ROOT / "README.md")}
    assert named == set(COMMANDS)


@pytest.mark.parametrize("result", sorted((DOCS / "results").glob("compare*.json")), ids=lambda path: path.stem)
def test_tables_are_those_of_the_kept_results(result):
    """Every kept comparison stands in a page as it was measured, beside the command that made it."""
    comparison = Comparison.load(result)
    text = "\n".join(page.read_text() for page in PAGES)
    assert markdown(comparison) in text
    assert comparison.settings["command"] in text


@pytest.mark.parametrize("result", sorted((DOCS / "results").glob("budgets*.json")), ids=lambda path: path.stem)
def test_tables_at_equal_compute_are_those_of_the_kept_results(result):
    numbers = json.loads(result.read_text())
    text = "\n".join(page.read_text() for page in PAGES)
    assert budgets_markdown(numbers) in text and numbers["command"] in text


@pytest.mark.parametrize(("result", "benchmark", "page"), BENCHMARKS, ids=[result for result, *_ in BENCHMARKS])
def test_the_benchmarks_tables_are_those_of_the_kept_rows(result, benchmark, page):
    kept = json.loads((DOCS / "results" / f"{result}.json").read_text())
    text = (DOCS / page).read_text()
    assert benchmark.markdown(kept["rows"]) in text and kept["command"] in text


def test_the_log_of_the_soak_is_from_the_kept_one():
    kept = json.loads((ROOT / "docs" / "results" / "soak.json").read_text())
    page = (DOCS / "how-to" / "interruptions.md").read_text()
    shown = re.findall(r"^    ( *\d+:\d\d run .*)$", page, re.MULTILINE)
    assert shown and set(shown) <= set(kept["events"])
    assert all(f"    {promise}\n" in page for promise in kept["broken"])


def test_the_table_of_the_performance_is_the_kept_one():
    kept = json.loads(sizes.LATEST.read_text())
    assert bench.markdown(kept["rows"], kept["curves"]) in (DOCS / "explanation" / "performance.md").read_text()
    assert sizes.markdown(sizes.rows(kept)) in (DOCS / "explanation" / "large-models.md").read_text()


@pytest.mark.parametrize("study", ["paper", "paper-smollm2"])
def test_the_kept_study_says_what_its_numbers_say(study):
    folder = DOCS / "results" / study
    figures = {
        path.stem.removeprefix("figure-"): json.loads(path.read_text()) for path in sorted(folder.glob("figure-*.json"))
    }
    settings = json.loads((folder / "settings.json").read_text())
    assert len(figures) == 17
    page = claims_page(figures, model=settings["model"], command=settings["command"])
    assert (folder / "claims.md").read_text() == page
    assert settings["command"] in (DOCS / "explanation" / "paper.md").read_text()


def test_the_dense_table_is_that_of_the_kept_rows():
    text = (DOCS / "explanation" / "paper.md").read_text()
    kept = json.loads((EMBEDDED["duo-tiny"] / "dense.json").read_text())
    assert markdown_of_dense(kept["rows"]) in text
    assert kept["settings"]["command"] in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        place = (page.parent / target).resolve()
        assert place.exists() or GENERATED.fullmatch(place.relative_to(ROOT).as_posix()), target


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    cells = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text())["cells"]
    program = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    (tmp_path / "notebook.py").write_text(program)
    quiet = {**os.environ, "MPLBACKEND": "agg"}
    done = subprocess.run([sys.executable, "notebook.py"], cwd=tmp_path, env=quiet, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert losses[1] < losses[0]  # the router is better than all-small


def test_the_release_is_the_same_everywhere():
    release = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert f"\nversion: {release}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^## (\S+),", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == release


def test_the_errors_page_quotes_messages_of_the_code():
    page = (DOCS / "reference" / "errors.md").read_text().split("## No error")[0]
    files = [path for folder in ("duorl", "envs", "agents") for path in ROOT.glob(f"{folder}/**/*.py")]
    code = "\n".join(path.read_text() for path in files)
    quoted = [
        cell
        for line in page.splitlines()
        if line.startswith("| `")
        for cell in re.findall(r"`([^`]+)`", line.split(" | ")[0])
    ]
    assert len(quoted) > 15
    for message in quoted:
        assert message in re.sub(r'"\s*\n\s*f?"', "", code), message


def test_the_oracles_table_is_the_kept_one():
    text = (DOCS / "explanation" / "experiments.md").read_text()
    rows = json.loads((DOCS / "results" / "oracle.json").read_text())["rows"]
    for row in rows:
        assert f"| {row['big']} | {row['loss']:.4f} | {row['compute']:.4f} | {row['fixed_loss']:.4f} |" in text
    assert rows[1]["loss"] < rows[8]["loss"]


@pytest.mark.slow
def test_the_worked_examples_of_parts_apply_and_work(tmp_path):
    """All diffs of CONTRIBUTING.md on a copy of the package as it is installed."""
    for folder in ("duorl", "envs", "agents", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    diffs = blocks(ROOT / "CONTRIBUTING.md", "diff")
    assert len(diffs) == 5
    for diff in diffs:
        subprocess.run(["git", "apply", "-"], cwd=tmp_path, input=diff, text=True, check=True)
    for folder in ("envs", "agents"):
        (tmp_path / "duorl" / folder).symlink_to(tmp_path / folder)
    (tmp_path / "try.py").write_text(
        "from conftest import make_original\n"
        "import duorl\n"
        "from duorl import agents, inputs, rewards, routers, testing\n"
        "from duorl.experiments.learners import named\n"
        "testing.check_reward(rewards.SmallBonus())\n"
        "testing.check_router(routers.EarlyRouter(2))\n"
        "testing.check_input(inputs.INPUTS['big_so_far'])\n"
        "testing.check_learner(named('randomsearch'))\n"
        "duorl.convert(make_original('xglm'), small_ratio=4)\n"
    )
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(tmp_path / "tests")])}
    done = subprocess.run([sys.executable, "try.py"], cwd=tmp_path, env=paths, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
