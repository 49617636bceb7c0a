"""The shards of `duorl oracle`: whoever searches them, and whenever, they make the search of one process."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from conftest import make_duo

from duorl.cli import main
from duorl.evaluation import RouteSearchOptions, choose_starts, plan_route_search, search_windows
from duorl.evaluation.columns import joined_columns, save_columns
from duorl.experiments import oracle as command

ALL = ("skip", "small", "big")


@pytest.mark.parametrize(
    ("method", "context"),
    [
        ("exhaustive", "reference"),
        ("exhaustive", "uniform"),
        ("exhaustive", "routed"),
        ("descent", "reference"),
        ("descent", "routed"),
        ("beam", "reference"),
    ],
)
def test_shards_find_what_the_windows_have_together(method, context, duo, tmp_path):
    windows = torch.randint(61, (5, 8), generator=torch.Generator().manual_seed(3))
    asked = RouteSearchOptions(method=method, context=context, actions=ALL, price=0.1)
    starts = choose_starts(duo, windows, asked) if method == "descent" else []
    together = search_windows(duo, windows, asked, method, starts)
    paths = []
    for part in windows.split(2):
        paths.append(tmp_path / f"{len(paths)}.safetensors")
        save_columns(search_windows(duo, part, asked, method, starts), paths[-1])
    joined = joined_columns(paths)
    assert joined.keys() == together.keys() >= {"losses"}
    for name, values in together.items():  # matrix products of other shapes may differ in their last bits
        assert torch.allclose(joined[name], values, atol=1e-5), name


def test_a_model_without_the_context_is_refused_before_the_search(tokens):
    duo = make_duo("gpt_neo")
    with pytest.raises(ValueError, match="gpt_neo: attention bypasses"):
        plan_route_search(duo, tokens, RouteSearchOptions())
    assert plan_route_search(duo, tokens, RouteSearchOptions(context="uniform")).method == "exhaustive"


# The command


@pytest.fixture(scope="module")
def place(small_corpus, tmp_path_factory):
    """A folder with a search by one process with one thread: three shards, and the patterns that they start from."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("shards")
        patch.chdir(folder)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        search(small_corpus, "alone", "--windows=5", "--processes=1")
        yield folder
        torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def inside(request, monkeypatch):
    if "place" in request.fixturenames:
        monkeypatch.chdir(request.getfixturevalue("place"))


def search(corpus, out, *options):
    main(["oracle", f"--corpus={corpus}", "--method=descent", "--window=8", "--shard=2", f"--out={out}", *options])


def results(out):
    """The numbers of a search, and its table of tokens."""
    numbers = json.loads(Path(out, "oracle.json").read_text())
    assert numbers.pop("settings")["window"] == 8
    return numbers, Path(out, "tokens.csv").read_text()


@pytest.mark.slow
def test_two_processes_find_what_one_finds(place, small_corpus):
    search(small_corpus, "two", "--windows=5", "--processes=2", "--threads=1")
    assert results("two") == results("alone")


def test_a_stopped_search_goes_on_with_the_shards_that_it_has(place, small_corpus, monkeypatch, capsys):
    searched = []

    def stopped(model, tokens, *more):
        searched.append(len(tokens))
        if len(searched) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("a search has nothing to save, so the signal ends it immediately")
        return search_windows(model, tokens, *more)

    monkeypatch.setattr(command, "search_windows", stopped)
    with pytest.raises(SystemExit) as stop:
        search(small_corpus, "stopped", "--windows=5", "--processes=1")
    said = capsys.readouterr().err
    assert stop.value.code == 143 and "duorl: stopped; go on with: " in said and "--resume" in said
    assert not Path("stopped", "oracle.json").exists()
    search(small_corpus, "stopped", "--windows=5", "--processes=1", "--resume")
    assert searched == [2, 2, 2, 1]
    assert results("stopped") == results("alone")


def test_more_windows_extend_a_search(place, small_corpus, monkeypatch):
    search(small_corpus, "grown", "--windows=3", "--processes=1")
    searched = []

    def counted(model, tokens, *more):
        searched.append(len(tokens))
        return search_windows(model, tokens, *more)

    monkeypatch.setattr(command, "search_windows", counted)
    search(small_corpus, "grown", "--windows=5", "--processes=1", "--resume")
    assert searched == [2, 1]  # the second shard had one window, and was not whole
    assert results("grown") == results("alone")
