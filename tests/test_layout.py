"""The house: imports run one way, functions and files stay short, and nothing is unpickled."""

import ast
import re
from pathlib import Path

import pytest

from docs import house
from docs.house import imported, part_of

ROOT = Path(__file__).parent.parent
# From the bottom up; those of one line do not know each other, but a package's own modules do.
ORDER = [
    {"ranks"},
    {"corpus", "costs", "closeness", "prices", "scores", "checks", "files", "hub", "markdown", "auto", "extensions"}
    | {"devices", "colours", "version"},
    {"inputs", "paths"},
    {"models"},
    {"routed_pass"},
    {"rewards", "smalls"},
    {"oracle"},
    {"routers"},
    {"envs"},  # knows no learner
    {"learners"},  # knows no environment
    {"agents"},
    {"evaluation"},  # knows neither environments nor agents
    {"runs"},
    {"paper"},
    {"reports"},
    {"testing"},
    {"experiments"},
    {"cli"},
    {"__main__"},
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
BESIDE = {("learners", "envs"), ("evaluation", "envs"), ("evaluation", "agents"), ("runs", "envs"), ("runs", "agents")}
BESIDE |= {(part, place) for part in ("paper", "reports") for place in ("envs", "agents")}
SOURCES = sorted(
    path for folder in ("duorl", "envs", "agents", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py")
)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_module_knows_only_what_stands_below_it(path):
    tree, part = ast.parse(path.read_text()), part_of(path)
    if part is None:
        return
    for other in imported(tree) - {part}:
        assert other in RANK, f"{other} has no place in the order"
        assert RANK[other] < RANK[part] and (part, other) not in BESIDE, f"{part} imports {other}"


def test_the_picture_of_the_house_is_that_of_the_imports():
    assert house.PICTURE.read_text() == house.draw()


def test_the_map_names_every_part_and_every_module_of_models():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"\w+", text[text.index("    duorl/\n") : text.index("    examples/")]))
    modules = {path.stem for path in (ROOT / "duorl" / "models").glob("*.py")} - {"__init__"}
    assert RANK.keys() | modules <= named | {"envs", "agents"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 600
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_unpickles_or_imports_bare_names(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {name.split(".")[0] for name in names} & {"pickle", "cloudpickle", "dill", "agents", "envs"}


_READERS = {"from_pretrained", "from_config", "get_config_dict", "load_dataset", "load_state_dict_from_url", "pipeline"}
_READERS |= {"load_adapter", "PeftModel", "AutoPeftModel"}  # of transformers and its neighbours


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_others_made_comes_through_the_gateway(path):
    """Other uses are `super()`'s, in classes that transformers reads by, or of our own configuration."""
    if path.name == "gateway.py":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("super()", "DuoConfig"):
            assert node.attr not in _READERS, f"{ast.unparse(node)}, line {node.lineno}"
            assert ast.unparse(node) not in ("torch.load", "np.load", "numpy.load"), f"line {node.lineno}"
        if isinstance(node, ast.ImportFrom | ast.Import):
            assert not {alias.name for alias in node.names} & _READERS, f"line {node.lineno}"
