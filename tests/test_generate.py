"""`duorl generate`: what it prints, the page, and what it refuses."""

import json
import re
from html import unescape

import pytest
import torch
from test_report import needs_chromium, opened

import duorl
from duorl.cli import main
from duorl.cli.generate import Writer
from duorl.reports.generated import token_rows
from duorl.routers import ConstantRouter, HeadRouter, PatternRouter

_PROMPT = "def read(path):"
_SHORT = ["generate", "--prompt", _PROMPT, "--max_new_tokens", "12"]


@pytest.fixture(scope="module")
def router(tmp_path_factory):
    """A router of duo-tiny that decides differently for every token."""
    made = HeadRouter(8, 192)
    torch.manual_seed(0)
    for parameter in made.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("router")
    made.save_pretrained(folder)
    return made, str(folder)


def expected(router, **options):
    model, tokenizer = duorl.load(), duorl.load_tokenizer()
    ids = tokenizer(_PROMPT, return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, **options}
    return model, tokenizer, ids, model.generate(ids, router=router, **options)


def test_it_prints_the_text_and_what_it_cost(router, capsys):
    main([*_SHORT, "--router", router[1], "--show", "routes"])
    printed = capsys.readouterr().out
    _, tokenizer, ids, found = expected(router[0])
    text = tokenizer.decode(found.sequences[0], skip_special_tokens=True)
    assert printed.startswith(text)
    spent = found.compute[0, ids.shape[1] - 1 :]
    assert f"compute {spent.mean():.2f}" in printed
    cells = re.findall(r"^([·▁█]{8}) (\d\.\d\d)", printed, re.MULTILINE)
    routes = found.routes[0, ids.shape[1] - 1 :].tolist()
    assert [row for row, _ in cells] == ["".join("·▁█"[action] for action in route) for route in routes]
    assert [share for _, share in cells] == [f"{share:.2f}" for share in spent.tolist()]


def test_a_draft_gives_the_same_text_and_colours(router, capsys):
    texts = []
    for more in ([], ["--draft", "small"], ["--draft", "small", "--lookup", "4"]):
        main([*_SHORT, "--router", router[1], "--show", "routes", *more])
        texts.append(capsys.readouterr().out)
    assert len({re.sub(r"\n\d+ tokens in .*", "", text) for text in texts}) == 1
    assert "drafted tokens kept" in texts[1] and "drafted tokens kept" not in texts[0]


def test_sampling_follows_the_seed(capsys):
    texts = []
    for seed in ("1", "1", "2"):
        main([*_SHORT, "--temperature", "1", "--seed", seed])
        texts.append(re.sub(r"\n\d+ tokens in .*", "", capsys.readouterr().out))
    assert texts[0] == texts[1] != texts[2]


def test_the_options_alone_say_how_tokens_are_chosen(tmp_path, capsys):
    """The model's folder has settings for sampling, too; of these, what ends a text is obeyed."""
    model, tokenizer, _, found = expected(ConstantRouter("big"))
    model.generation_config.update(num_beams=2, repetition_penalty=3.0, stop_strings=["import"])
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    main([*_SHORT, "--model", str(tmp_path), "--router", "big"])
    assert capsys.readouterr().out.startswith(tokenizer.decode(found.sequences[0], skip_special_tokens=True))


def test_a_text_that_ends_within_a_character_is_printed_to_its_end(capsys):
    model, tokenizer = duorl.load(), duorl.load_tokenizer()
    writer = Writer(model, tokenizer, ConstantRouter("big"))
    ids = tokenizer("a\N{SNOWMAN}")["input_ids"][:-1]  # the character has several tokens
    assert tokenizer.decode(ids).endswith("\ufffd")
    model(input_ids=torch.tensor([ids]), router=writer.transcript)
    writer.put(torch.tensor([ids[:1]]))
    for token in ids[1:]:
        writer.put(torch.tensor([token]))
    writer.end()
    assert capsys.readouterr().out == tokenizer.decode(ids) + "\n"


def test_the_rows_of_the_page_are_those_of_the_generation(router):
    model, tokenizer, ids, found = expected(router[0], output_logits=True)
    rows = token_rows(model, router[0], found.sequences, tokenizer, written=ids.shape[1])
    written = [row for row in rows if not row["given"]]
    assert len(rows) == found.sequences.shape[1] - 1 and len(written) == len(found.logits)
    for row, logits, token in zip(written, found.logits, found.sequences[0, ids.shape[1] :], strict=True):
        shares = logits[0].softmax(-1)
        assert row["loss"] == pytest.approx(-shares[token].log().item(), abs=1e-4)
        assert row["alternatives"][0][1] == pytest.approx(shares.max().item(), abs=1e-4)
        assert row["alternatives"][0][0] == row["token"] == tokenizer.decode([token])
    assert [row["route"] for row in rows] == found.routes[0].tolist()


@needs_chromium
@pytest.mark.slow
def test_the_page_opens_and_shows_a_token(router, tmp_path):
    page = tmp_path / "text.html"
    main([*_SHORT, "--router", router[1], "--html", str(page)])
    _, tokenizer, ids, found = expected(router[0])
    dom, console = opened(page, tmp_path)
    assert not console
    text = "".join(re.findall(r"<span class=.token[^>]*>(.*?)</span>", dom, re.DOTALL))
    assert unescape(text) == tokenizer.decode(found.sequences[0, 1:])
    first = tokenizer.decode([found.sequences[0, ids.shape[1]]])
    shown = dom.partition('id="shown">')[2].partition("<script")[0]
    assert f"<code>{first!r}</code>: loss" in unescape(shown) and shown.count("<i title=") == 8
    assert "http://" not in page.read_text() and "https://" not in page.read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "x", "--chat", "true"], "duo-tiny has no chat template: leave out --chat"),
        (["--prompt", "x", "--max_new_tokens", "4000"], "with 4000 more the text is beyond the model's 1024 positions"),
        (["--prompt", "x", "--max_new_tokens", "0"], "max_new_tokens must be at least 1"),
        (["--prompt", "x", "--temperature", "-1"], "temperature must be at least 0"),
        (["--prompt", "x", "--price", "0.3", "--router", "{router}"], "trained for one price"),
        (["--prompt", "x", "--router", "{other}"], "made for a model of layers 2, this one has 8"),
        (["--prompt", "x", "--draft", "{other}"], "made for a model of layers 2, this one has 8"),
        (["--prompt", "x", "--router", "{priced}"], "this router is for prices from 0.1 to 2: give --price"),
        (["--prompt", "x", "--router", "nowhere"], "no router in nowhere"),
    ],
)
def test_bad_input_is_refused_in_one_line(options, said, router, tmp_path, capsys):
    PatternRouter([1, 2]).save_pretrained(tmp_path / "other")
    HeadRouter(8, 192, prices=(0.1, 2.0)).save_pretrained(tmp_path / "priced")
    places = {"router": router[1], "other": tmp_path / "other", "priced": tmp_path / "priced"}
    with pytest.raises(SystemExit) as stopped:
        main(["generate", *(option.format(**places) for option in options)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and said in error and error.count("\n") == 1


def test_rows_are_json(duo):
    class Names:
        def decode(self, tokens):
            return "</script>" + str(int(tokens[0]))

    rows = token_rows(duo, ConstantRouter("small"), torch.tensor([[1, 2, 3]]), Names(), written=1)
    assert json.loads(json.dumps(rows)) == rows
