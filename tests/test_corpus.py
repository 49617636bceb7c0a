"""The corpora, their splits, and windows of a user's own text."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duorl.corpus import BUILT_IN, documents, load_windows, split_of
from duorl.models.tokenizer import train_tokenizer

SPLITS = ("model", "router", "evaluation")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["def f(x):\n    return x\n"] * 10, 300)


def test_splits_are_a_hash_of_the_path():
    """Known values: they must never change, or models would be evaluated on text they were trained on."""
    assert [split_of(path) for path in ("typing.py", "argparse.py", "asyncio/locks.py")] == list(SPLITS)


@given(st.text())
def test_every_path_has_a_split(path):
    assert split_of(path) in SPLITS


@pytest.mark.parametrize("source", BUILT_IN)
def test_splits_are_disjoint_and_cover_the_corpus(source):
    paths = [{document.path for document in documents([source], split)} for split in SPLITS]
    everything = {document.path for document in BUILT_IN[source](lambda path: True)}
    assert set.union(*paths) == everything
    assert sum(map(len, paths)) == len(everything)


def test_a_modules_docstrings_stay_in_the_split_of_its_source():
    code = {document.path: document.text for document in documents(["stdlib-code"], "evaluation")}
    docs = [d for d in documents(["stdlib-docs"], "evaluation") if not d.path.startswith("pydoc_data/")]
    assert docs and all(document.path in code for document in docs)


def test_windows_overlap_by_the_token_that_is_predicted_next(tokenizer, tmp_path):
    text = "".join(f"line {number}\n" for number in range(30000))
    (tmp_path / "mine.txt").write_text(text)
    windows = load_windows([str(tmp_path / "mine.txt")], tokenizer, split="model", length=16)
    texts = (document.text for document in documents([str(tmp_path / "mine.txt")], "model"))
    stream = [token for text in texts for token in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)]
    expected = [stream[start : start + 17] for start in range(0, len(stream) - 16, 16)]
    assert sorted(windows.tolist()) == sorted(expected)
    assert windows.tolist() != expected  # shuffled, so that the first few are not of one document


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet"])
def test_a_users_files_are_read_whole(suffix, tokenizer, tmp_path):
    rows = [f"document {number} " * 50 for number in range(40)]
    path = tmp_path / f"mine.{suffix}"
    if suffix == "txt":
        path.write_text("\n".join(rows))
    elif suffix == "jsonl":
        path.write_text("\n".join(json.dumps({"text": row}) for row in rows))
    else:
        import pandas

        pandas.DataFrame({"text": rows}).to_parquet(path)
    read = "".join(d.text for split in SPLITS for d in documents([str(tmp_path / "*")], split))
    assert all(row.strip() in read for row in rows)


def test_bad_text_is_refused_by_name(tokenizer, tmp_path):
    (tmp_path / "zero.txt").touch()
    (tmp_path / "columns.jsonl").write_text('{"body": "x"}\n')
    (tmp_path / "page.html").write_text("x")
    (tmp_path / "short.txt").write_text("short")
    for name, message in (
        ("zero.txt", r"zero\.txt is empty"),
        ("columns.jsonl", "no column 'text', only body"),
        ("page.html", "cannot read .*page"),
        ("short.txt", r"window of 16 \+ 1"),
        ("gone.txt", "no text at"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            for split in SPLITS:
                load_windows([str(tmp_path / name)], tokenizer, split=split, length=16)


@given(st.text())
def test_the_tokenizer_gives_any_text_back(text):
    tokenizer = train_tokenizer(["abc"], 257)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
