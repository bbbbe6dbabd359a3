"""Rules of the house: imports flow one way, files stay small and documented, nothing is unpickled, importing is light."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vit_linearizer

PACKAGE = "vit_linearizer"
ROOT = Path(vit_linearizer.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))
#: A module may import from what stands to its left, or from its own package.
ORDER = (
    "contracts", "ops", "models", "objectives", "data", "evaluation", "tasks", "training", "recipes", "benchmarking",
    "exporting", "reporting", "commands", "cli",
)  # fmt: skip
#: They offer everything, or start it.
EXEMPT = ("__init__", "__main__")
MOST_LINES = 350

every_source = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.relative_to(ROOT).as_posix())


def parse(source: Path) -> ast.Module:
    return ast.parse(source.read_text(encoding="utf-8"))


def dotted(node: ast.expr) -> str:
    """``torch.load`` for the expression of that name, or an empty string."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def imports(tree: ast.Module, package: tuple[str, ...]) -> Iterator[str]:
    """Full dotted names of all that a module in ``package`` imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def part_of(source: Path) -> str:
    """The package of `ORDER` that a file belongs to."""
    return source.relative_to(ROOT).parts[0].removesuffix(".py")


def wrong_way(tree: ast.Module, package: tuple[str, ...], part: str) -> list[str]:
    """Imports of this project that stand to the right of ``part``, or in no place at all."""
    own = [name.split(".") for name in imports(tree, package) if name.split(".")[0] == PACKAGE]
    allowed = ORDER[: ORDER.index(part) + 1]
    return [".".join(name) for name in own if len(name) < 2 or name[1] not in allowed]


def test_sources_are_found():
    assert len(SOURCES) > 30
    assert {"contracts", "ops", "models", "objectives", "data", "tasks", "commands", "cli"} <= {part_of(s) for s in SOURCES}


@every_source
def test_imports_flow_one_way(source):
    part = part_of(source)
    if part not in EXEMPT:
        assert part in ORDER
        assert wrong_way(parse(source), (PACKAGE, *source.relative_to(ROOT).parent.parts), part) == []


@pytest.mark.parametrize(
    ("statement", "found"),
    [
        ("from ..ops import ssd", []),
        ("from . import images", []),
        ("from .images import read_image", []),
        ("from ..data.images import read_image", []),
        ("import torch", []),
        ("from ..commands.distill import distill", ["vit_linearizer.commands.distill.distill"]),
        ("from .. import tasks", ["vit_linearizer.tasks"]),
        ("from .. import load", ["vit_linearizer.load"]),
        ("import vit_linearizer", ["vit_linearizer"]),
        ("import vit_linearizer.cli", ["vit_linearizer.cli"]),
        ("def f():\n    from ..training import loop", ["vit_linearizer.training.loop"]),
    ],
)
def test_the_rule_itself_catches_imports_from_the_right(statement, found):
    assert wrong_way(ast.parse(statement), (PACKAGE, "data"), "data") == found


@every_source
def test_a_file_holds_one_idea_and_says_which(source):
    text = source.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    assert (ast.get_docstring(ast.parse(text)) or "").strip()


UNPICKLERS = ("pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve")


def unsafe_loads(tree: ast.Module) -> list[str]:
    """Whatever could run code from a file."""
    found = [name for name in imports(tree, (PACKAGE,)) if name.split(".")[0] in UNPICKLERS or name == "torch.load"]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if dotted(node.func) == "torch.load" and keywords.get("weights_only") != "True":
                found.append(ast.unparse(node))
            if keywords.get("allow_pickle", "False") != "False":
                found.append(ast.unparse(node))
    return found


@every_source
def test_nothing_is_unpickled(source):
    assert unsafe_loads(parse(source)) == []


@pytest.mark.parametrize(
    ("code", "safe"),
    [
        ("torch.load(file, map_location='cpu', weights_only=True)", True),
        ("np.load(file)", True),
        ("torch.load(file)", False),
        ("torch.load(file, weights_only=False)", False),
        ("from torch import load", False),
        ("import pickle", False),
        ("from pickle import loads", False),
        ("def f():\n    import joblib", False),
        ("np.load(file, allow_pickle=True)", False),
    ],
)
def test_the_rule_itself_catches_unpickling(code, safe):
    assert (unsafe_loads(ast.parse(code)) == []) == safe


IMPORTING = """
import json, sys
import timm
before = set(timm.list_models("adventurer*"))
import vit_linearizer
names = sorted(set(timm.list_models("adventurer*")) - before)
modules = [name for name in ("accelerate", "sklearn", "matplotlib", "tyro", "rich", "transformers", "onnx", "tensorboard")
           if name in sys.modules]
print(json.dumps([names, modules]))
"""


def test_importing_registers_the_students_and_leaves_the_commands_for_later():
    done = subprocess.run([sys.executable, "-c", IMPORTING], capture_output=True, text=True, check=True)
    names, modules = json.loads(done.stdout)
    assert names == sorted(
        f"adventurer_{name}_224"
        for name in (
            "tiny_patch16", "small_patch16", "base_patch16", "large_patch16",
            "small_patch14", "base_patch14", "large_patch14",
            "base_patch8",
        )
    )  # fmt: skip
    assert modules == []


def test_every_public_name_can_be_had():
    for name in vit_linearizer.__all__:
        assert getattr(vit_linearizer, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'distil'"):
        vit_linearizer.distil  # noqa: B018
