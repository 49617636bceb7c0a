"""The corpora, their splits, and windows of a user's own text."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duorl.corpus import BUILT_IN, check_sources, documents, load_windows, split_of
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
        (".", "it is a folder, give .*txt"),
        ("*.jsonl*", "no column 'text'"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            for split in SPLITS:
                load_windows([str(tmp_path / name)], tokenizer, split=split, length=16)


def parquet_of(columns, path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path)


ROWS = [json.dumps({"text": f"row {number}"}) for number in range(5)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "caf\xe9 bar".encode("latin-1"), r"a\.txt is not UTF-8: byte 3 is 0xe9; convert it"),
        ("a.txt", "text".encode("utf-16"), "looks like UTF-16"),
        ("a.txt", gzip.compress(b"text", mtime=0), "looks like gzip"),
        ("a.txt", b"one\ntwo\0", r"a\.txt: line 2 of the text holds U\+0000"),
        ("a.txt", b" \n\t\n", "holds no text"),
        ("a.jsonl", "\n".join([*ROWS, "{'text': 1}"]).encode(), r"a\.jsonl, line 6 is not JSON"),
        ("a.jsonl", "\n".join([*ROWS, "", '["x"]']).encode(), r"line 7 is an array, not an object"),
        ("a.jsonl", "\n".join([*ROWS, '{"text": null}']).encode(), r"line 6: 'text' is null, not a string"),
        ("a.jsonl", "\n".join([*ROWS, '{"text": NaN}']).encode(), r"line 6: 'text' is a number, not a string"),
        ("a.jsonl", "\n".join([*ROWS, '{"text": {}}']).encode(), r"line 6: 'text' is an object"),
        ("a.jsonl", "\n".join([*ROWS, '{"body": "x"}']).encode(), r"line 6 has no column 'text', only body"),
        ("a.jsonl", "\n".join([*ROWS, '{"text": "\\ud800"}']).encode(), r"line 6: .* U\+D800"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}', r"is not UTF-8: byte 24 is 0xff"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("a.parquet", b"PAR1 and no more", r"cannot read .*a\.parquet as Parquet"),
        ("a.parquet", {"text": [1, 2]}, r"a\.parquet, row 1: 'text' is a number"),
        ("a.parquet", {"text": ["x", None]}, r"row 2: 'text' is null"),
        ("a.parquet", {"text": [["x"]]}, r"row 1: 'text' is an array"),
        ("a.parquet", {"text": [b"x"]}, r"row 1: 'text' is of type bytes"),
        ("a.parquet", {"text": []}, "holds no text"),
        ("a.parquet", {"body": ["x"]}, "no column 'text', only body"),
    ],
)
def test_what_is_no_text_is_refused_by_file_place_and_cause(name, content, message, tmp_path):
    path = tmp_path / name
    parquet_of(content, path) if isinstance(content, dict) else path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as refused:
        documents([str(path)], "model")
    assert str(path) in str(refused.value)


def read(path) -> str:
    return "".join(document.text for split in SPLITS for document in documents([str(path)], split))


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.txt", b"\xef\xbb\xbfone\r\ntwo\rthree", "one\ntwo\nthree"),
        ("A.TXT", "caf\xe9 \U0001f600".encode(), "caf\xe9 \U0001f600"),
        ("a b [1] \xfc.txt", b"odd name", "odd name"),
        ("a.jsonl", b'\xef\xbb\xbf{"text": "one"}\r\n\n  \n', "one"),
        ("a.jsonl", b'{"other": NaN, "text": "\\ud83d\\ude00 \xe2\x80\xa8"}', "\U0001f600 \u2028"),
    ],
)
def test_odd_files_that_are_text_are_read_right(name, content, text, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name) == text


def test_one_long_line_serves_all_splits(tmp_path):
    words = " ".join(str(number) for number in range(100_000))
    (tmp_path / "line.txt").write_text(words)
    parts = [documents([str(tmp_path / "line.txt")], split) for split in SPLITS]
    assert all(parts) and all(len(document.text) <= 2**15 for part in parts for document in part)
    assert sorted(" ".join(document.text for part in parts for document in part).split()) == sorted(words.split())


def test_texts_are_named_once(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    for names in (["stdlib-code", "stdlib-code"], [f"{tmp_path}/a.txt", f"{tmp_path}/*.txt"]):
        with pytest.raises(ValueError, match="is named twice"):
            check_sources(names)
    for names in ([], [""], ""):
        with pytest.raises(ValueError, match="no text is named"):
            check_sources(names)


@given(st.text())
def test_the_tokenizer_gives_any_text_back(text):
    tokenizer = train_tokenizer(["abc"], 257)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
