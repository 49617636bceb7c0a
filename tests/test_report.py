"""The HTML report, opened in headless Chromium."""

import json
import os
import re
import shutil
import subprocess
from html import unescape
from itertools import pairwise

import pytest
import torch
from matplotlib import pyplot as plt
from test_frontier import made_up
from test_paper import Names, small_study

from duorl.colours import ink, luminance, of_compute, of_loss
from duorl.evaluation import Comparer, EvaluationOptions, budget_rows, summaries
from duorl.paper import claims_page, draw, pictures
from duorl.paper.claims import claims
from duorl.reports import page as report
from duorl.reports.charts import coloured_text
from duorl.routers import ConstantRouter, HeadRouter

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None and "CI" not in os.environ, reason="no Chromium here: apt-get install chromium"
)


def opened(page, folder) -> tuple[str, list[str]]:
    """The document as it stands after its scripts have run, without network, and the console's lines."""
    assert CHROMIUM, "the report must be opened: apt-get install chromium"
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"]
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", *quiet]
    offline = ["--host-resolver-rules=MAP * ~NOTFOUND", "--proxy-server=127.0.0.1:9"]
    watched = ["--enable-logging=stderr", "--virtual-time-budget=20000", "--window-size=1200,4000", "--dump-dom"]
    profile = f"--user-data-dir={folder / 'profile'}"
    done = subprocess.run(
        [*command, *offline, *watched, profile, page.as_uri()], capture_output=True, text=True, timeout=240, check=True
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def comparison_run(duo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison")
    windows = torch.randint(61, (24, 8), generator=torch.Generator().manual_seed(2))
    options = EvaluationOptions(windows=8, reference_windows=4, fixed_windows=4)
    comparer = Comparer(
        duo, windows[:12], windows[12:], price=0.1, actions=("small", "big"), reference="small", options=options
    )
    routers = {
        "all-big": ConstantRouter("big"),
        "best fixed": comparer.fixed,
        "<heads> & more": HeadRouter(3, 32),
    }
    settings = {"command": "duorl compare --out 'a folder'", "price": 0.1}
    seeds = {name: [router] for name, router in routers.items()}
    comparer.compare({**seeds, **comparer.bounds}, settings).save(folder)
    traces = comparer.traces(Names())
    assert traces["bound"] == "exact" and {"oracle", "difficulty"} <= set(traces["difficulty"][0])
    (folder / "traces.json").write_text(json.dumps(traces))
    return folder


@pytest.fixture(scope="module")
def paper_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paper")
    figures = small_study().run()
    draw(figures, folder)
    (folder / "settings.json").write_text(json.dumps({"command": "duorl paper", "model": "a model"}))
    (folder / "claims.md").write_text(claims_page(figures, model="a model", command="duorl paper"))
    return folder, figures


def test_a_report_asks_for_nothing_outside(comparison_run):
    page = report.write(comparison_run).read_text()
    own = page.replace(re.search(r"<script>.*?</script>", page, re.DOTALL)[0], "")  # plotly's own code
    assert not re.findall(r"(?:src|href)=['\"](?!data:)", own)
    assert "https://" not in own and "http://" not in own


@needs_chromium
@pytest.mark.slow
def test_the_report_of_a_comparison_shows_its_numbers(comparison_run, tmp_path):
    document, console = opened(report.write(comparison_run), tmp_path)
    assert not console, console
    assert len(re.findall(r'class="[^"]*js-plotly-plot', document)) == 4
    assert len(re.findall(r'class="main-svg"', document)) >= 4  # every chart was drawn, not only placed
    table = re.search(r'<table id="routers">(.*?)</table>', document, re.DOTALL)[1]
    shown = [re.findall(r"<td[^>]*>(.*?)</td>", line, re.DOTALL) for line in table.split("<tr>")[2:]]
    rows = json.loads((comparison_run / "comparison.json").read_text())["rows"]
    assert [unescape(cells[0]).rstrip("*") for cells in shown] == [row["router"] for row in rows]
    for row, line in zip(rows, table.split("<tr>")[2:], strict=True):
        cells = dict(re.findall(r'data-key="(\w+)" data-value="([^"]+)"', line))
        assert {key: float(value) for key, value in cells.items()} == {key: row[key] for key in cells}
        for key in ("loss", "compute", "return", "regret"):
            low, high = row[f"{key}_interval"]
            assert f">{row[key]:.3f}<" in line and f"{low:.3f} to {high:.3f}" in line
    assert "duorl compare --out 'a folder'" in document
    assert document.count('title="all-small') == 2 * 2 * 7  # two colourings of two windows of seven tokens


@needs_chromium
@pytest.mark.slow
def test_the_report_shows_routers_at_equal_compute(comparison_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(comparison_run, folder)
    ladders = {"best fixed": made_up(0.0, 1), "good": made_up(-0.05, 3)}
    found = {
        "tokens": 60,
        "all_big": 1.5,
        "rows": budget_rows(ladders, [0.3, 0.95]),
        "routers": summaries(ladders, level=1.8, worst=torch.full((60,), 3.5)),
    }
    (folder / "budgets.json").write_text(json.dumps({"command": "duorl compare", "texts": {"a text": found}}))
    document, console = opened(report.write(folder), tmp_path)
    assert not console, console
    assert len(re.findall(r'class="[^"]*js-plotly-plot', document)) == 5
    lines = re.search(r'<table class="budgets">(.*?)</table>', document, re.DOTALL)[1].split("<tr>")[2:]
    assert len(lines) == 4 and "data-key" not in lines[2]  # neither reaches 95 %
    cells = dict(re.findall(r'data-key="([^"]+)" data-value="([^"]+)"', lines[1]))
    against = found["rows"][1]["minus"]["best fixed"]
    assert float(cells["best fixed"]) == against["difference"] and float(cells["loss"]) == found["rows"][1]["loss"]
    assert f"{against['interval'][0]:.4f} to {against['interval'][1]:.4f}" in lines[1]


@needs_chromium
@pytest.mark.slow
def test_the_report_of_a_paper_run_shows_its_claims_and_charts(paper_run, tmp_path):
    folder, figures = paper_run
    document, console = opened(report.write(folder), tmp_path)
    assert not console, console
    assert len(re.findall(r'class="[^"]*js-plotly-plot', document)) == 4 + 1 + 1 + 1 + 2  # 4b, maps, 4a, 4c, 7
    table = re.search(r'<table id="claims">(.*?)</table>', document, re.DOTALL)[1]
    for claim in claims(figures):
        assert claim.measured in unescape(table)


@pytest.mark.parametrize(("bound", "said"), [("descent", "a lower bound of the oracle"), ("none", "no bound in its")])
def test_a_report_without_an_oracle_says_so(bound, said, duo, tmp_path):
    windows = torch.randint(61, (24, 8), generator=torch.Generator().manual_seed(2))
    options = EvaluationOptions(windows=8, reference_windows=4, fixed_windows=4, bound=bound)
    settings = {"price": 0.1, "actions": ("skip", "small", "big"), "reference": "small", "options": options}
    comparer = Comparer(duo, windows[:12], windows[12:], **settings)
    routers = {"all-big": [ConstantRouter("big")], **comparer.bounds}
    comparer.compare(routers, {"command": "duorl compare", "price": 0.1}).save(tmp_path)
    (tmp_path / "traces.json").write_text(json.dumps(comparer.traces(Names())))
    page = report.write(tmp_path).read_text()
    assert page.count(said) >= 2 and "oracle per number" not in page
    assert ("lower bound of the oracle&#x27;s return*" in page) == (bound == "descent") == ("Token difficulty" in page)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no run in .*neither comparison\.json"):
        report.write(tmp_path)


def test_a_harder_token_is_darker_and_its_ink_can_be_read():
    losses = [0.0, 1.0, 3.0, 5.9, 6.0, 7.6, 20.0]
    colours = [of_loss(nats) for nats in losses]
    assert all(luminance(one) >= luminance(other) for one, other in pairwise(colours))
    assert luminance(colours[0]) > 0.9 and luminance(colours[-1]) < 0.1
    for colour in [*colours, *(of_compute(share / 10) for share in range(11))]:
        light, dark = sorted((luminance(colour), 1.0 if ink(colour) == "#ffffff" else 0.0), reverse=True)
        assert (light + 0.05) / (dark + 0.05) > 4.5  # what WCAG 2.2 asks for
    rows = [{"token": "x", "all_small": nats, "difficulty": nats} for nats in losses]
    page = coloured_text(rows, "all_small")
    figure, axis = plt.subplots()
    pictures._write(axis, rows, "all_small")
    drawn = [text.get_bbox_patch().get_facecolor()[:3] for text in axis.texts]
    plt.close(figure)
    assert drawn == [pytest.approx(colour) for colour in colours]
    assert re.findall(r"rgb\((\d+),(\d+),(\d+)\)", page) == [
        tuple(str(round(255 * part)) for part in colour) for colour in colours
    ]
