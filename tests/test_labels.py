"""Labels on disk: learners learn from them what they learn from a search, and nothing else is taken for them."""

import json
from pathlib import Path

import datasets
import pytest
import torch
from conftest import make_duo

from duorl import routers
from duorl.cli import main
from duorl.envs import Lockstep
from duorl.learners import KNN, Ensemble, Supervised
from duorl.learners.shards import ABOUT, SHARDS, LabelFolder, write_about, write_shard
from duorl.learners.sources import Source
from duorl.prices import ladder
from duorl.rewards import LossImprovement

BOTH = ("small", "big")


@pytest.fixture(scope="module")
def windows():
    return torch.randint(61, (6, 10), generator=torch.Generator().manual_seed(3))


def stored(folder, model, windows, base=None, prices=(0.1,)):
    """A folder of labels in shards of four windows, and what is in it."""
    source, found = Source(model, BOTH, base), []
    write_about(folder, model, BOTH, searched=source.searches)
    for number, tokens in enumerate(windows.split(4)):
        generator = torch.Generator().manual_seed(number)
        found.append(source.table(tokens) or source.deviations(tokens, prices, generator))
        write_shard(folder / "shards" / str(number) / "labels.parquet", tokens, found[-1])
    return found


@pytest.mark.parametrize("prices", [None, (0.01, 1.0)])
@pytest.mark.parametrize("kind", [Supervised, KNN, Ensemble])
def test_a_learner_learns_from_a_folder_what_it_learns_from_its_own_search(kind, prices, duo, windows, tmp_path):
    stored(tmp_path, duo, windows)
    env = Lockstep(duo, windows, reward=LossImprovement(0.1), windows_per_batch=2, prices=prices)
    options = {"windows": 5, **({"neighbours": 3} if kind is KNN else {"epochs": 2})}
    own = kind(env, **options).learn(1).state_dict()
    taken = kind(env, **options, base=str(tmp_path)).learn(1).state_dict()
    assert own.keys() == taken.keys() and all(torch.equal(own[name], taken[name]) for name in own)


def test_deviations_are_read_as_they_were_made(duo, windows, tmp_path):
    routers.HeadRouter(3, 32, seed=0, prices=(0.01, 1.0)).save_pretrained(tmp_path / "router")
    made = stored(tmp_path / "labels", duo, windows, base=str(tmp_path / "router"), prices=ladder((0.01, 1.0), 5))
    read = LabelFolder.open(tmp_path / "labels", duo, BOTH).deviations(windows)
    for name in ("losses", "spent", "hidden", "compute"):
        assert torch.equal(getattr(read, name), torch.cat([getattr(part, name) for part in made], dim=1))
    assert torch.equal(read.routes, torch.cat([part.routes for part in made]))
    assert len(read.price.unique()) > 1 and torch.equal(read.price, torch.cat([part.price for part in made]))


def test_datasets_reads_the_shards(duo, windows, tmp_path):
    made = stored(tmp_path, duo, windows)
    rows = datasets.Dataset.from_parquet([str(path) for path in sorted(tmp_path.glob(SHARDS))], cache_dir=str(tmp_path))
    assert torch.tensor(rows["tokens"][:]).equal(windows)
    losses = torch.tensor(rows["losses"][:]).view(6, 9, 8)
    assert torch.allclose(losses, torch.cat([part.losses for part in made]))


def test_labels_of_something_else_are_refused(duo, windows, tmp_path):
    stored(tmp_path, duo, windows)
    folder = str(tmp_path)
    with pytest.raises(ValueError, match=r"has labels of the actions small, big, not of skip, small, big: give --act"):
        Source(duo, ("skip", *BOTH), folder)
    with pytest.raises(ValueError, match=r"has labels of the model .*, not of .*: label text with this model"):
        Source(make_duo("qwen3"), BOTH, folder)
    env = Lockstep(duo, windows.flip(1), reward=LossImprovement(0.1))
    for kind in (Supervised, KNN):
        with pytest.raises(ValueError, match=r"no labels of 6 of 6 windows: label more with `duorl label --out"):
            kind(env, windows=6, base=folder)
    (tmp_path / ABOUT).write_text(json.dumps({"model": {}}))
    with pytest.raises(ValueError, match=r"cannot read the labels in .*: make them anew"):
        Source(duo, BOTH, folder)


@pytest.mark.slow
def test_labels_are_made_once_and_grow(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("\n".join(f"def f{number}(x): return x + {number}" for number in range(4000)))
    label = ["label", "--corpus", "text.txt", "--window", "16", "--shard", "2", "--out", "labels"]
    main([*label, "--windows", "3", "--processes", "1"])
    first = {path: path.read_bytes() for path in Path().glob(f"labels/{SHARDS}")}
    assert len(first) == 2 and "4 of " in capsys.readouterr().out
    main([*label, "--windows", "8", "--processes", "2", "--resume"])
    grown = sorted(Path().glob(f"labels/{SHARDS}"))
    assert len(grown) == 4 and all(path.read_bytes() == content for path, content in first.items())
    main([*label[:-1], "whole", "--windows", "8", "--processes", "1"])
    for path in grown:
        assert path.read_bytes() == Path("whole", *path.parts[1:]).read_bytes()
    rivals = "{supervised: {class_path: Supervised, init_args: {windows: 8, epochs: 1}}}"
    train = ["train", "--corpus", "text.txt", "--env.window", "16", "--rivals", rivals, "--total_decisions", "2000"]
    few = {
        "windows": 2,
        "reference_windows": 1,
        "fixed_windows": 1,
        "finalists": 2,
        "final_windows": 2,
        "bound": "none",
    }
    train += [f"--evaluation.{name}={value}" for name, value in few.items()]
    main([*train, "--out", "own"])
    main([*train, "--labels", "labels", "--out", "taken"])
    own, taken = (Path(run, "routers/supervised/router.safetensors").read_bytes() for run in ("own", "taken"))
    assert own == taken
    with pytest.raises(SystemExit) as stop:
        main([*train, "--env.window", "8", "--labels", "labels", "--out", "other"])
    assert stop.value.code == 2 and "no labels of 8 of 8 windows" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main([*train, "--rivals", "[]", "--labels", "labels", "--out", "other"])
    assert stop.value.code == 2 and "labels: no learner takes them" in capsys.readouterr().err
