"""The pages that `make docs` makes: without a warning, whole, and to be read without a network."""

import ast
import html
import logging
import re
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="pip install '.[docs]'")
pytest.importorskip("mkdocstrings", reason="pip install '.[docs]'")

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "nfnet_keras"
_DEFINITIONS = (ast.FunctionDef, ast.ClassDef)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the pages, and what was said while they were made."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    said = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("mkdocs").addHandler(handler)
    folder = tmp_path_factory.mktemp("site")
    try:
        config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder))
        config.plugins.on_startup(command="build", dirty=False)
        build(config)
    finally:
        logging.getLogger("mkdocs").removeHandler(handler)
    return folder, said


@pytest.fixture(scope="module")
def pages(site):
    """The text of every page, by its path."""
    return {path.relative_to(site[0]).as_posix(): path.read_text(encoding="utf-8") for path in site[0].rglob("*.html")}


def plain(text: str) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", text))


def modules() -> dict[str, ast.Module]:
    """The public modules' sources by the path of their page."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] != "__init__" and not any(part.startswith("_") for part in parts):
            found[f"reference/{'/'.join(parts)}.html"] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def test_nothing_is_warned_of(site):
    assert site[1] == []


def test_every_module_has_a_page_with_all_that_is_described_in_it(pages):
    for page, tree in modules().items():
        named = f"nfnet_keras{page.removeprefix('reference/nfnet_keras').removesuffix('.html')}".replace("/", ".")
        for node in tree.body:
            if isinstance(node, _DEFINITIONS) and not node.name.startswith("_") and ast.get_docstring(node):
                assert f'id="{named}.{node.name}"' in pages[page], f"{named}.{node.name}"


def test_examples_and_sections_are_no_running_text(pages):
    """Examples are code, not quotations, and what is said of arguments, results and errors is in lists."""
    for page, tree in modules().items():
        shown = pages[page]
        assert "<blockquote>" not in shown, page
        for node in tree.body:
            if not isinstance(node, _DEFINITIONS) or node.name.startswith("_"):
                continue
            said = ast.get_docstring(node) or ""
            if ">>> " in said:
                first = next(line for line in said.splitlines() if line.strip().startswith(">>> ")).strip()
                codes = [plain(code) for code in re.findall(r"<pre[^>]*>.*?</pre>", shown, re.DOTALL)]
                assert any(first in code for code in codes), f"{page}: {node.name}"
        for title in ("Args", "Returns", "Raises", "Example", "Keyword Args"):
            assert not re.search(rf"<p>{title}:", shown), f"{page}: {title}"


def test_tables_are_tables(pages):
    for page, text in pages.items():
        prose = re.sub(r"<(pre|code)\b.*?</\1>", "", text.partition('role="main"')[2], flags=re.DOTALL)
        assert not re.search(r"^\|", plain(prose), re.MULTILINE), page
    assert pages["index.html"].count("<table") == 3


def test_packages_list_what_they_offer(pages):
    import nfnet_keras as nfk

    front = pages["reference/nfnet_keras/index.html"]
    for name in nfk.__all__:
        if not name.startswith("__"):
            assert re.search(rf"<a [^>]*><code>{name}</code></a>", front), name
    family = pages["reference/nfnet_keras/applications/nfnet.html"]
    assert "<code>NFNetF7Plus</code>" in family


def test_the_navigation_leads_to_every_page(pages):
    home = pages["index.html"]
    for page in pages:
        if page not in ("404.html", "index.html", "search.html"):
            assert f'href="{page}"' in home, page


def test_no_page_needs_a_network(pages):
    """But for the badges of the front page, whose words stand beside them."""
    for page, text in pages.items():
        needed = re.findall(r'<(?:script|img|iframe)[^>]* src="([^"]*)"', text)
        needed += re.findall(r'<link[^>]* href="([^"]*)"', text)
        away = [address for address in needed if "//" in address]
        if page == "index.html":
            away = [address for address in away if not address.startswith("https://img.shields.io/")]
        assert away == [], page


def test_every_link_between_pages_leads_somewhere(site, pages):
    for page, text in pages.items():
        for link in re.findall(r'(?:href|src)="([^"]+)"', text):
            place, _, anchor = html.unescape(link).partition("#")
            if "//" in place or place.startswith(("mailto:", "data:")) or page == "404.html":
                continue
            target = (site[0] / page).parent / place if place else site[0] / page
            assert target.exists(), f"{link} in {page}"
            if anchor and target.suffix == ".html":
                shown = pages[target.resolve().relative_to(site[0].resolve()).as_posix()]
                assert f'id="{anchor}"' in shown, f"{link} in {page}"
