"""Which files windows are from: the units of intervals."""

import json

import pytest
import torch

from duorl.corpus import documents, read_windows
from duorl.models.tokenizer import train_tokenizer

LENGTH = 16


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["def f(x):\n    return x\n"] * 10, 300)


def in_order(windows, found, tokenizer):
    """The windows' files in the order of the text, and the tokens' documents."""
    encoded = [(*tokenizer(document.text)["input_ids"], tokenizer.eos_token_id) for document in found]
    stream = [token for ids in encoded for token in ids]
    owners = [document for document, ids in zip(found, encoded, strict=True) for _ in ids]
    place = dict(zip(map(tuple, windows.tokens.tolist()), windows.files.tolist(), strict=True))
    starts = range(0, len(stream) - LENGTH, LENGTH)
    numbers = [place[tuple(stream[start : start + LENGTH + 1])] for start in starts]
    return numbers, [owners[start + 1] for start in starts]


@pytest.mark.parametrize("kind", ["files", "rows"])
def test_a_window_is_of_the_file_of_its_first_predicted_token(kind, tokenizer, tmp_path):
    """Of a text file, however many blocks it is read in, or of a table's row."""
    lines = [range(60 + 900 * (name % 3)) for name in range(20)]
    texts = ["".join(f"text {name}, {hash((name, line))}\n" for line in lines[name]) for name in range(20)]
    if kind == "rows":
        (tmp_path / "all.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    for name, text in enumerate(texts if kind == "files" else []):
        (tmp_path / f"{name}.txt").write_text(text)
    windows = read_windows(str(tmp_path / "*"), tokenizer, split="model", length=LENGTH)
    found = documents(str(tmp_path / "*"), "model")
    numbers, owners = in_order(windows, found, tokenizer)
    texts_of = [owner.text.split(",")[0] for owner in owners]  # every block begins with the name of its text
    assert len(set(texts_of)) > 10 and len({owner.path for owner in owners}) > len(set(texts_of))
    pairs = set(zip(numbers, texts_of, strict=True))
    assert len(pairs) == len(set(numbers)) == len(set(texts_of))


def test_a_file_alone_is_cut_into_runs_of_windows(tokenizer, tmp_path):
    (tmp_path / "one.txt").write_text("".join(f"line {number}\n" for number in range(9000)))
    windows = read_windows(str(tmp_path / "one.txt"), tokenizer, split="model", length=LENGTH)
    numbers, _ = in_order(windows, documents(str(tmp_path / "one.txt"), "model"), tokenizer)
    assert numbers == sorted(numbers)
    lengths = torch.tensor(numbers).bincount().tolist()
    assert set(lengths[:-1]) == {round(len(numbers) ** (1 / 3))} and lengths[-1] <= lengths[0]
