"""The wheel, installed beside nothing else, in a folder of a user who has folders of the same names."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("agents", "duorl", "envs", "pyproject.toml", "README.md", "LICENSE")
PARTS = ("agents", "envs", "learners", "oracle", "rewards", "routers", "testing")
OWN = ("agents", "configs", "envs", "tests")

ALONE = {**{key: value for key, value in os.environ.items() if key != "PYTHONPATH"}, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, for setuptools would put what older builds left beside the sources into it."""
    source, place = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", place, source]
    done = subprocess.run(build, env=ALONE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (built,) = place.glob("duorl-*.whl")
    return built


@pytest.fixture(scope="module")
def fresh(wheel, tmp_path_factory):
    """A virtual environment with the wheel; what it depends on comes from the running one, by a .pth file's plain path.

    Such a path does not carry the .pth files behind it, so that an editable duorl there is not found.
    """
    place = tmp_path_factory.mktemp("fresh")
    venv.create(place, symlinks=True)
    (packages,) = place.glob("lib/python*/site-packages")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", packages, wheel]
    done = subprocess.run(install, env=ALONE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (packages / "dependencies.pth").write_text("\n".join(_dependencies()))
    return place


def _dependencies() -> list[str]:
    """Where the running environment has its packages, those that its own .pth files lead to included."""
    places = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path]
    return [place for place in dict.fromkeys(places) if place.endswith(("site-packages", "dist-packages"))]


@pytest.fixture
def own(tmp_path):
    """A user's folder, with packages of the names that the repository has, each with a mark."""
    for name in OWN:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"mine = {name!r}\n")
    return tmp_path


def run(fresh: Path, folder: Path, *words: str) -> str:
    done = subprocess.run([fresh / "bin" / "python", *words], cwd=folder, env=ALONE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_wheel_has_everything_and_takes_no_name_but_one(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"duorl"}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "duorl").rglob("*.py*") if path.suffix != ".pyc"}
    sources |= {
        f"duorl/{path.relative_to(ROOT)}" for name in ("agents", "envs") for path in (ROOT / name).glob("*.py*")
    }
    embedded = [path for name in ("duo_tiny", "smollm2") for path in (ROOT / "duorl/models" / name).iterdir()]
    model = {str(path.relative_to(ROOT)) for path in embedded if path.is_file()}
    assert {"duorl/agents/__init__.pyi", "duorl/envs/__init__.py"} <= sources
    assert "duorl/models/duo_tiny/model.safetensors" in model
    assert sources | model | {"duorl/py.typed"} <= set(names)


@pytest.mark.slow
def test_the_readmes_first_example_runs_beside_folders_of_the_same_names(fresh, own):
    first = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    seen = "import json, sys\nprint(json.dumps([duorl.__file__, duorl.agents.__file__, duorl.envs.__file__]))\n"
    (own / "example.py").write_text(first + seen)
    *printed, places = run(fresh, own, "example.py").strip().splitlines()
    assert printed and all(place.startswith(str(fresh)) for place in json.loads(places))
    assert (own / "my-router" / "router.safetensors").is_file()


LAZY = f"""
import json, subprocess, sys
import duorl
print(json.dumps([getattr(duorl, name).__file__ for name in {PARTS}]))
import agents, configs, envs, tests
print(json.dumps([agents.mine, configs.mine, envs.mine, tests.mine]))
import gymnasium
print(gymnasium.make("duorl/Routing-v0").reset(seed=0)[0].__class__.__name__)
"""


@pytest.mark.slow
def test_all_parts_are_there_without_further_imports_and_the_users_packages_stay_the_users(fresh, own):
    (own / "go.py").write_text(LAZY)
    parts, mine, observation = run(fresh, own, "go.py").strip().splitlines()
    assert all(place.startswith(str(fresh)) for place in json.loads(parts)) and len(json.loads(parts)) == len(PARTS)
    assert json.loads(mine) == list(OWN) and observation == "dict"
    duorl = fresh / next(path.relative_to(fresh) for path in fresh.glob("**/bin/duorl"))
    answered = run(fresh, own, str(duorl), "--version")
    assert re.fullmatch(r"duorl \d+\.\d+\.\d+\n", answered)
