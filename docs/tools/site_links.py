"""A hook of mkdocs: links that leave docs/ lead somewhere on the site too.

The pages are written to be read on the forge, where ``../src/vit_linearizer/contracts.py`` leads to the file. On the site
such a link leads to the module in the reference; else to the page that a Markdown file at the root has become; else, for a
picture, to its copy; else to the repository, where ``extra.repository_files`` has its address; and is plain text otherwise.
A link to a file that does not exist is left as it is, and fails the strict build.
"""

import posixpath
import re
from collections.abc import Callable
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
#: Markdown files at the root that are pages of the site, by their name there.
ROOT_PAGES = {f"{name}.md": f"{name.lower()}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG", "LOG")}
PICTURES = (".png", ".svg", ".jpg")
#: Where pictures from outside docs/ go.
PICTURE_FOLDER = "pictures"

_FENCED = re.compile(r"^( *)```.*?^\1```\s*?$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(?P<picture>!?)\[(?P<text>(?:[^\[\]]|\\.)*)\]\((?P<path>[^)#\s:]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from the root, and every picture outside docs/ that a page shows."""
    for name, place in ROOT_PAGES.items():
        files.append(File.generated(config, place, content=(ROOT / name).read_text(encoding="utf-8")))
    for file in list(files.documentation_pages()):
        for link in _LINK.finditer(file.content_string):
            path = _in_repository(file.src_uri, link["path"])
            place = f"{PICTURE_FOLDER}/{path}"
            outside = not path.startswith("docs/") and path.endswith(PICTURES)
            if outside and (ROOT / path).is_file() and place not in files.src_uris:
                files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with its links as the site needs them."""
    here = page.file.src_uri
    modules = documented_modules(files)

    def rewrite(link: re.Match[str]) -> str:
        path = _in_repository(here, link["path"])
        target = None
        if path.startswith("docs/"):
            target = path.removeprefix("docs/")
        elif path in ROOT_PAGES:
            target = ROOT_PAGES[path]
        elif path.endswith(PICTURES):
            target = f"{PICTURE_FOLDER}/{path}"
        file = files.get_file_from_path(target) if target else None
        if target and file and file.inclusion.is_included():
            shown = posixpath.relpath(target, posixpath.dirname(here) or ".")
            return f"{link['picture']}[{link['text']}]({shown}{link['anchor'] or ''})"
        if not (ROOT / path).exists():
            return link[0]
        if (module := _module(path)) in modules:
            return f"[{link['text']}][{module}]"
        if repository := config.extra["repository_files"]:
            return f"[{link['text']}]({repository.rstrip('/')}/{path})"
        return link["text"]

    return outside_code(markdown, lambda text: _LINK.sub(rewrite, text))


def outside_code(markdown: str, change: Callable[[str], str]) -> str:
    """A page with all but its fenced blocks changed."""
    parts, end = [], 0
    for block in _FENCED.finditer(markdown):
        parts += [change(markdown[end : block.start()]), block[0]]
        end = block.end()
    return "".join([*parts, change(markdown[end:])])


def documented_modules(files: Files) -> set[str]:
    """Full names of the modules that the reference shows."""
    pages = [file.content_string for file in files.documentation_pages() if file.src_uri.startswith("reference/")]
    return {name for text in pages for name in re.findall(r"^::: (\S+)", text, re.MULTILINE)}


def _in_repository(page: str, path: str) -> str:
    """Where a link on a page of the site leads, seen from the repository's root."""
    names = {place: name for name, place in ROOT_PAGES.items()}
    return posixpath.normpath(posixpath.join(posixpath.dirname(names.get(page, f"docs/{page}")), path))


def _module(path: str) -> str:
    """``src/vit_linearizer/ops/norm.py`` as ``vit_linearizer.ops.norm``."""
    return path.removeprefix("src/").removesuffix(".py").removesuffix("/__init__").replace("/", ".")
