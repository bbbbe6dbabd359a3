"""The documentation: every link and anchor, the recipes' tables, and the site itself, built strictly and without network."""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent
PAGES = (REPO / "README.md", *sorted((REPO / "docs").glob("*.md")))
#: Pages that the site makes of files outside docs/.
ROOT_PAGES = ("README", "CONTRIBUTING", "CHANGELOG", "LOG")

#: What makes a browser load something, by element; a link to click on does not.
LOADING = {
    "audio": "src", "embed": "src", "iframe": "src", "img": "src", "link": "href", "object": "data", "script": "src",
    "source": "src", "video": "src",
}  # fmt: skip
#: Kinds of <link> that point somewhere without loading it.
NAMING = ("canonical", "next", "prev", "edit")


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^( *)```.*?^\1```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def links(page: Path) -> Iterator[tuple[str, str]]:
    """Relative links: (path, anchor), either of which may be empty."""
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(page))):
        if "://" not in target and not target.startswith("mailto:"):
            path, _, anchor = target.partition("#")
            yield path, anchor


def anchors(page: Path) -> set[str]:
    """What a forge makes of a page's headings: lower case, no punctuation, hyphens for blanks, numbered if repeated."""
    found: dict[str, int] = {}
    result = set()
    for heading in re.findall(r"^#+ +(.+?) *$", prose(page), re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        result.add(f"{anchor}-{found[anchor]}" if anchor in found else anchor)
        found[anchor] = found.get(anchor, 0) + 1
    return result


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPO).as_posix())
def test_every_link_and_anchor_leads_somewhere(page: Path) -> None:
    for path, anchor in links(page):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        if anchor:
            assert target.suffix == ".md", f"{path}#{anchor}"
            assert anchor in anchors(target), f"{path}#{anchor}"


def test_anchors_are_made_as_a_forge_makes_them(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A `b.py`, c (d)\n## Twice\n## Twice\n```\n# no heading\n```\n## one \N{EN DASH} two\n", encoding="utf-8"
    )
    assert anchors(page) == {"a-bpy-c-d", "twice", "twice-1", "one--two"}


def test_the_tables_of_recipes_are_those_of_the_code() -> None:
    spec = importlib.util.spec_from_file_location("write_recipes", REPO / "docs" / "tools" / "write_recipes.py")
    assert spec is not None and spec.loader is not None
    writer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(writer)
    page = (REPO / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert writer.with_tables(page) == page, "run: python docs/tools/write_recipes.py"
    for name in writer.tables():
        assert f"<!-- recipes: {name} -->" in page
    assert "| `--learning-rate` | 0.0015 | 0.0015 |" in page
    assert writer.with_tables(page.replace("| 0.0015 |", "| 0.1 |")) == page


class Loads(HTMLParser):
    """What a page of HTML loads, and the ids and links in it."""

    def __init__(self, html: str):
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in LOADING and given.get("rel") not in NAMING:
            self.loads.append(given.get(LOADING[tag], ""))
        self.loads += [part.strip().split(" ")[0] for part in given.get("srcset", "").split(",") if part.strip()]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed, so the site was not built: pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    # Proxies that nobody answers at: a build that fetches something fails.
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=REPO, env={**os.environ, **nowhere}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, "\n".join(line for line in done.stderr.splitlines() if not line.startswith("INFO"))
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Loads]:
    return {file: Loads(file.read_text(encoding="utf-8")) for file in site.rglob("*.html")}


def test_the_site_builds_strictly_and_has_every_page(site: Path) -> None:
    wanted = [page.stem for page in (REPO / "docs").glob("*.md")] + [name.lower() for name in ROOT_PAGES]
    assert not [name for name in wanted if not (site / f"{name}.html").is_file()]
    source = REPO / "src" / "vit_linearizer"
    assert not [
        folder.name for folder in source.iterdir()
        if (folder / "__init__.py").is_file() and not (site / "reference" / f"{folder.name}.html").is_file()
    ]  # fmt: skip


def test_no_page_loads_anything_from_elsewhere(site: Path, pages: dict[Path, Loads]) -> None:
    assert sum(len(page.loads) for page in pages.values()) > len(pages)
    for file, page in pages.items():
        outside = [target for target in page.loads if re.match(r"(https?:)?//", target)]
        assert not outside, file
        missing = [t for t in page.loads if t and not t.startswith("data:") and file.name != "404.html"
                   and not (file.parent / t.partition("?")[0].partition("#")[0]).exists()]  # fmt: skip
        assert not missing, file
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", style.read_text(encoding="utf-8")), style


def test_every_link_of_the_site_leads_somewhere(pages: dict[Path, Loads]) -> None:
    for file, page in pages.items():
        for link in page.links:
            if re.match(r"[a-z]+:", link) or file.name == "404.html":
                continue
            path, _, anchor = link.partition("#")
            target = (file.parent / path).resolve() if path else file
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{file.name}: {link}"
            if anchor and target in pages:
                assert anchor in pages[target].ids, f"{file.name}: {link}"


def test_source_files_lead_to_the_reference(site: Path, pages: dict[Path, Loads]) -> None:
    assert "reference/ops.html#vit_linearizer.ops.ssd_reference" in pages[site / "paper_map.html"].links


def test_the_reference_shows_signatures_and_docstrings(site: Path, pages: dict[Path, Loads]) -> None:
    text = " ".join("".join(pages[site / "reference.html"].text).split())
    for words in ("keep_softmax_blocks", "adala leaves so many last blocks as they are", "UserError"):
        assert words in text
