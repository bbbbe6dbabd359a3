"""A hook of mkdocs: a page of the reference for every package, its modules in the order of their names.

docs/reference.md shows the commands as functions. The pages made here, ``reference/PACKAGE.md``, show every other module,
from its docstrings (mkdocstrings), so that no module can be forgotten.
"""

import ast
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "vit_linearizer"
#: The entry of the navigation that the pages are added to.
SECTION = "Reference"
#: Whoever searches wants the pages about use first.
_SEARCH = "---\nsearch:\n  boost: 0.2\n---\n\n"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages into the navigation."""
    assert config.nav is not None
    entries = next(entry[SECTION] for entry in config.nav if SECTION in entry)
    entries += [{package: f"reference/{package}.md"} for package in pages(by_hand(config))]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    for package, modules in pages(by_hand(config)).items():
        text = "".join(f"\n::: {module}\n{_options(module)}" for module in modules)
        files.append(File.generated(config, f"reference/{package}.md", content=f"{_SEARCH}# {package}\n{text}"))
    return files


def by_hand(config: MkDocsConfig) -> set[str]:
    """Modules that pages in docs/ show."""
    texts = [page.read_text(encoding="utf-8") for page in Path(config.docs_dir).glob("*.md")]
    return {module for text in texts for module in re.findall(r"^::: (\S+)", text, re.MULTILINE)}


def pages(elsewhere: set[str]) -> dict[str, list[str]]:
    """Full names of modules by the package that stands below the root, without those that another page shows."""
    found: dict[str, list[str]] = {}
    source = ROOT / "src"
    for file in sorted((source / PACKAGE).rglob("*.py"), key=lambda file: file.with_suffix("").parts):
        parts = [part for part in file.relative_to(source).with_suffix("").parts if part != "__init__"]
        name = ".".join(parts)
        if len(parts) > 1 and not parts[-1].startswith("_") and name not in elsewhere:
            found.setdefault(parts[1], []).append(name)
    return found


def _options(module: str) -> str:
    """For a package: only what is defined in its own file, since what it offers from its modules is shown with them."""
    file = ROOT / "src" / module.replace(".", "/") / "__init__.py"
    if not file.is_file():
        return ""
    defined = [node.name for node in ast.parse(file.read_text(encoding="utf-8")).body if hasattr(node, "name")]
    members = [name for name in defined if not name.startswith("_")]
    return f"    options:\n      members: {members or 'false'}\n"
