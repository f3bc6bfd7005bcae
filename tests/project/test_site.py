"""The site of `make docs`: it builds without a warning, and every link inside it leads somewhere. Sphinx is
an extra (`docs`), so these tests are skipped where it is not installed."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

for module in ("myst_parser", "furo"):
    pytest.importorskip(module, reason="make docs installs it")
main = pytest.importorskip("sphinx.cmd.build", reason="make docs installs it").main

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
OPTIONS = ["-q", "-W", "--keep-going", "-b", "html"]


class Page(HTMLParser):
    """The anchors and the links of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids |= {given["id"]} if given.get("id") else set()
        for name in ("href", "src"):
            self.links += [given[name]] if given.get(name) else []


def dead_links(site: Path) -> list[str]:
    """Links of a site to files or anchors that it does not have, and to other hosts but the theme's."""
    pages = {path.name: Page(path.read_text()) for path in site.glob("*.html")}
    found = []
    for name, page in pages.items():
        for link in page.links:
            url = urlparse(link)
            target, anchor = unquote(url.path) or name, unquote(url.fragment)
            if url.scheme or url.netloc:
                continue
            if not (site / target).exists():
                found.append(f"{name}: {link}")
            elif anchor and target in pages and anchor not in pages[target].ids:
                found.append(f"{name}: {link}")
    return sorted(set(found))


def loads(site: Path) -> list[str]:
    """Scripts, styles and pictures that a page loads from another host."""
    found = []
    for path in site.glob("*.html"):
        text = path.read_text()
        found += re.findall(r"<(?:script|img|source)[^>]+src=\"((?:https?:)?//[^\"]+)", text)
        found += re.findall(r"<link[^>]+rel=\"stylesheet\"[^>]+href=\"((?:https?:)?//[^\"]+)", text)
    return found


def build(pages: Path, site: Path) -> tuple[int, str]:
    """Runs Sphinx as `make docs` does, in this process. Returns the exit status and what was said."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        status = main([*OPTIONS, str(pages), str(site)])
    return status, said.getvalue()


def empty(pages: Path) -> None:
    """Makes a folder of pages without a page."""
    for name in ("conf.py", "docstrings.py"):
        shutil.copy(DOCS / name, pages)
    shutil.copytree(DOCS / "_static", pages / "_static")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    made = tmp_path_factory.mktemp("site")
    status, said = build(DOCS, made)
    assert status == 0, said
    return made


def test_every_link_of_the_site_leads_somewhere(site):
    assert len(list(site.glob("*.html"))) > 15
    assert dead_links(site) == [] and loads(site) == []


def test_the_reference_shows_arguments_and_links_to_methods(site):
    page = (site / "reference.html").read_text()
    assert 'id="zokern.axpy_"' in page and "<strong>residuals</strong>" in page
    assert 'href="methods.html#addax"' in page and 'id="zokern.optimizer.ZerothOrder.flush"' in page


def test_a_dead_link_is_found(tmp_path):
    (tmp_path / "a.html").write_text('<h1 id="top"></h1><a href="b.html#here"></a><a href="#top"></a>')
    (tmp_path / "b.html").write_text('<p id="there"><a href="c.html">x</a><script src="https://cdn/x.js">')
    assert dead_links(tmp_path) == ["a.html: b.html#here", "b.html: c.html"]
    assert loads(tmp_path) == ["https://cdn/x.js"]


@pytest.mark.parametrize(
    "page, complaint",
    [
        ("# Title\n\n[link](nowhere.md)\n", "nowhere.md"),
        ("# Title\n\n```{eval-rst}\n.. autofunction:: zokern.stride\n```\n", "stride"),
    ],
    ids=["a link", "a name"],
)
def test_a_wrong_page_is_an_error(page, complaint, tmp_path):
    empty(tmp_path)
    (tmp_path / "index.md").write_text(page)
    status, said = build(tmp_path, tmp_path / "site")
    assert status != 0 and complaint in said


def test_a_page_in_no_list_is_an_error(tmp_path):
    empty(tmp_path)
    (tmp_path / "index.md").write_text("# Title\n")
    assert build(tmp_path, tmp_path / "site") == (0, "")
    (tmp_path / "lost.md").write_text("# Lost\n")
    status, said = build(tmp_path, tmp_path / "site")
    assert status != 0 and "lost.md" in said
