"""Options that name something to read: what is checked, and what is sent to other machines."""

import re
from dataclasses import is_dataclass
from pathlib import Path
from typing import Annotated, get_args

import pytest
import yaml
from conftest import make_original
from jsonargparse.typing import import_object

from duorl import convert
from duorl.cli import COMMANDS, main
from duorl.cli.parser import parse
from duorl.experiments.built import option_class
from duorl.experiments.reading import files_read
from duorl.models import find_base, save_small
from duorl.paths import OptionsOf, Reads, RouterPath, TextPath, named, option_types
from duorl.routers import ConstantRouter
from duorl.runs.cluster import OnCluster
from duorl.runs.remote import RUN

OUTPUTS = {"out", "html", "run"}  # where a command writes, and what `report` works in
OTHERS = {"tasks", "backbone"}  # tasks belong to another library and run here; the other one only speaks of a folder


class Own:
    """A user's part that reads files."""

    def __init__(self, table: Path, router: RouterPath | None = None, name: str = "x"):
        self.table, self.router, self.name = table, router, name


def test_types_say_what_options_read():
    assert list(named(list[TextPath] | TextPath, ["a.txt", "b/*.txt"])) == [("text", "a.txt"), ("text", "b/*.txt")]
    assert list(named(list[TextPath] | TextPath, "a.txt")) == [("text", "a.txt")]
    assert list(named(tuple[Annotated[str, Reads("text", ", ")], ...], ["a, b", "c"])) == [("text", x) for x in "abc"]
    assert list(named(RouterPath | None, None)) == [] == list(named(str, "a.txt"))
    own = {"class_path": f"{__name__}.Own", "init_args": {"table": "t.csv", "router": "r", "name": "n.txt"}}
    found = [("file", "t.csv"), ("router", "r")]
    assert list(named(dict[str, object], {"mine": own})) == found == list(named(object, own))
    soft = Annotated[dict, OptionsOf("duorl.learners.Soft")]
    assert list(named(soft, {"init": "r", "sharpness": "r"})) == [("router", "r")]


def test_the_learners_say_what_they_read():
    from duorl.experiments.learners import LEARNERS

    for path in LEARNERS.values():
        types = option_types(import_object(path))
        assert {name for name, hint in types.items() if RouterPath in get_args(hint)} >= {"init", "base"} & set(types)


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"report"}))
def test_an_option_that_reads_files_says_so_in_its_type(command):
    """What the documentation calls a folder, a file or a path is no mere text."""
    kind = option_class(command)
    assert is_dataclass(kind)
    documented = dict(re.findall(r"^ {8}(\w+): ((?:.|\n {12})*)", kind.__doc__, re.M))
    for name, text in documented.items():
        if re.search(r"\b(folder|file|(?<!import )path|glob)", text) and name not in OUTPUTS | OTHERS:
            hint = str(option_types(kind)[name])
            assert "Reads(" in hint or "PretrainOptions" in hint, f"{command} --{name}"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A current folder where much is called like an option's value."""
    monkeypatch.chdir(tmp_path)
    for name in ("PPO", "duo-tiny", "routed", "small", "random", "out", "runs", "stdlib-code", "A", "reference"):
        Path(name).mkdir()
        Path(name, "large.bin").touch()
    for name in ("a.txt", "b.txt", "other.txt", "text.jsonl"):
        Path(name).write_text("text")
    ConstantRouter("small").save_pretrained("start")
    return tmp_path


def read(command, *words):
    return [str(path) for path in files_read(command, yaml.safe_load(parse(command, words)[1]))]


def test_only_what_options_name_to_read_travels(place):
    assert read("compare", "--out", "out", "--agents={PPO: PPO}", "--rivals=[]") == []
    agents = "{A: {class_path: REINFORCE, init_args: {init: start}}, PPO: PPO}"
    words = ["--corpus", "[a.txt, 'b*.txt', stdlib-code]", f"--agents={agents}", "--out=out", "--transfer=[text.jsonl]"]
    assert sorted(read("compare", *words)) == ["a.txt", "b.txt", "start", "text.jsonl"]
    assert read("compare", "--corpus", str(place / "a.txt"), "--rivals=[]") == []  # there must be one there already
    assert read("label", "--base=small") == read("label", "--base=random") == [] and read("label", "--base=start") == [
        "start"
    ]
    assert read("paper", "--soft={init: start}", "--prose=a.txt", "--code=stdlib-code") == ["a.txt", "start"]


def test_a_model_travels_with_its_base(place):
    make_original("llama").save_pretrained("models/base")
    base = find_base("models/base")
    save_small(convert(base.load(), small_ratio=4), "models/small", base)
    assert read("oracle", "--model=models/small") == ["models/small", "models/base"]
    assert read("oracle", "--model=duo-tiny") == []


def test_a_job_names_paths_as_paths():
    cluster = OnCluster.__new__(OnCluster)
    cluster.folder = Path("runs/mine")
    given = {
        "place": Path("runs/mine/routers/A"),
        "name": "runs/mine",
        "other": Path("a.txt"),
        "many": [Path("runs/mine/x")],
    }
    there = {"place": Path(RUN, "routers/A"), "name": "runs/mine", "other": Path("a.txt"), "many": [Path(RUN, "x")]}
    assert cluster._there(given) == there


@pytest.mark.parametrize("option", ["--corpus", "--transfer"])
def test_a_missing_text_is_refused_before_a_model_is_loaded(option, place, capsys, monkeypatch):
    monkeypatch.setattr("duorl.experiments.material.load", lambda *given, **more: pytest.fail("loaded"))
    with pytest.raises(SystemExit) as stopped:
        main(["compare", option, "[gone.txt]", "--targets=[0.5]", "--env.prices=[0.1, 1.0]", "--out=mine"])
    assert stopped.value.code == 2 and "no text at 'gone.txt'" in capsys.readouterr().err and not Path("mine").exists()
