"""The site is built as it would be published: strictly, into a folder that is looked at."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.pages import ROOT

#: What a browser loads by itself.
LOADS = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src", "video": "src"}


class Loaded(HTMLParser):
    """Collects what a page loads, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if (value := dict(attrs).get(LOADS.get(tag, ""))) is not None:
            self.found.append(value)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)], cwd=ROOT,
        capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return folder


def read(page: Path) -> Loaded:
    parser = Loaded()
    parser.feed(page.read_text(encoding="utf-8"))
    return parser


def test_every_page_is_there(site):
    found = {path.parent.relative_to(site).as_posix() for path in site.rglob("index.html")}
    pages = {path.relative_to(ROOT / "docs").with_suffix("").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    pages = {page.removesuffix("/README") for page in pages}
    assert pages | {".", "contributing", "changelog"} <= found


def test_nothing_is_loaded_from_elsewhere(site):
    for page in site.rglob("*.html"):
        if page.is_relative_to(site / "results"):  # reports that tools wrote lie there
            continue
        strays = [url for url in read(page).found if re.match(r"(https?:)?//", url)]
        assert not strays, f"{page.relative_to(site)} loads {strays}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(https?:)?//|@import [\"']?(https?:)?//", sheet.read_text(encoding="utf-8"))


def test_the_first_page_is_the_readme_and_links_lead_on_in_the_site(site):
    page = (site / "index.html").read_text(encoding="utf-8")
    assert 'href="use/#limits"' in page and 'href="contributing/"' in page and 'href="results/in-turns.txt"' in page
    assert "docs/use.md" not in re.sub(r"<pre.*?</pre>|<code.*?</code>", "", page, flags=re.DOTALL)
    assert "Two commands" in "".join(read(site / "index.html").text)


def test_the_reference_has_what_users_call_with_its_docstrings(site):
    page = (site / "api" / "index.html").read_text(encoding="utf-8")
    text = " ".join("".join(read(site / "api" / "index.html").text).split())
    for name in ("build.build", "runtime.loading.load", "runtime.pipeline.Pipeline.__call__", "errors.DigestError"):
        assert f'id="jitexport.{name}"' in page
    assert "Turn a model into an engine bundle." in text
    assert "engines/<model>-<speed-up>x" in text  # as it is written, and not as HTML
