"""The documentation as a site: built strictly, and opened in headless Chromium."""

import os
import re
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from browser import Browser
from test_docs import DOCS, ROOT
from test_report import CHROMIUM, needs_chromium

from duorl.cli.commands import COMMANDS
from duorl.cli.parser import build_parser

if "CI" not in os.environ:
    pytest.importorskip("mkdocstrings", reason='needs pip install -e ".[docs]"')
pytestmark = pytest.mark.slow
ELSEWHERE = re.compile(r"<(?:script|img|link)[^>]*(?:src|href)=[\"']?(https?:)?//")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def address(site):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_every_page_is_in_the_site_and_asks_for_nothing_elsewhere(site):
    written = {path.relative_to(DOCS).with_suffix("") for path in DOCS.rglob("*.md")}
    found = {path.relative_to(site).parent for path in site.rglob("index.html")}
    assert len(written) > 25 and {page for page in written if page.name != "index"} <= found
    for page in site.rglob("*.html"):
        text = page.read_text()
        assert not ELSEWHERE.search(text), page
        for image in re.findall(r'<img[^>]*src="([^"]+)"', text):
            assert image.startswith("data:") or (page.parent / image).resolve().is_file(), image


@pytest.mark.parametrize("name", COMMANDS)
def test_the_reference_has_every_option_of_a_command(name, site):
    page = (site / "reference" / "commands" / "index.html").read_text()
    (section,) = re.findall(rf'<h2 id="duorl-{name}">(.*?)(?:<h2 |</article>)', page, re.DOTALL)
    options = [one.option_strings[0] for one in build_parser(name)._actions if one.option_strings]
    shown = [option for option in options if not option.endswith(("-h", ".help", "print_config"))]
    assert all(f"<code>{option}</code>" in section for option in shown)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    assert CHROMIUM
    with Browser(CHROMIUM, tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@needs_chromium
def test_a_reader_finds_the_way(address, browser):
    """From the first page by a link and by a search, with pictures, without errors, and to no other host."""
    browser.open(f"{address}/")
    complete = "[...document.images].every(image => image.complete && image.naturalWidth > 0)"
    assert browser.until(f"document.images.length > 0 && {complete}")
    tabs = browser.until("[...document.querySelectorAll('.md-tabs__link')].map(tab => tab.innerText.trim())")
    assert tabs == ["Start", "Tutorials", "How-to", "Reference", "Explanation"]
    browser.until("(document.querySelector('a[href*=first-router]').click(), true)")
    assert browser.until("location.pathname.includes('first-router') && document.querySelector('h1').innerText")
    browser.open(f"{address}/?q=regret")
    links = "[...document.querySelectorAll('.md-search-result__link')].map(link => link.href)"
    browser.until(f"{links}.length")
    assert any("reference/metrics" in link for link in browser.until(links))
    assert not browser.errors
    assert {request.split("/")[2] for request in browser.requests if request.startswith("http")} == {
        address.split("/")[2]
    }
