"""Imports point one way, meshes ◄─ costmodels ◄─ planner ◄─ cli.py, and heavy packages wait."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "meshes": {"meshes"},
    "costmodels": {"meshes", "costmodels"},
    "planner": {"meshes", "costmodels", "planner"},
    "cli": {"meshes", "costmodels", "planner", "cli"},
}
OURS = {*MAY_IMPORT, "tests", "benchmarks"}
# Text that is copied into exported files; nothing imports it.
TEMPLATES = {"planner/export/jax_template.py"}
HEAVY = {"jax", "jaxlib", "libtpu", "flax", "torch", "dask", "tensorflow"}


def sources() -> list[Path]:
    found = [p for layer in MAY_IMPORT for p in (ROOT / layer).rglob("*.py")]
    return sorted([*found, *(p for p in [ROOT / "cli.py"] if p.is_file())])


def imported(node: ast.AST) -> Iterator[str]:
    """Top-level names of the packages that one statement imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name.split(".")[0] for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: relative import"
        yield (node.module or "").split(".")[0]


def at_import_time(tree: ast.AST) -> Iterator[ast.AST]:
    """Everything but the bodies of functions."""
    for child in ast.iter_child_nodes(tree):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from at_import_time(child)


def upward(path: str, text: str) -> set[str]:
    """Our packages that the module at `path` imports, in functions too, and must not."""
    layer = path.split("/")[0].removesuffix(".py")
    names = {name for node in ast.walk(ast.parse(text)) for name in imported(node)}
    return (names & OURS) - MAY_IMPORT[layer]


def eager(text: str) -> set[str]:
    """Heavy packages that importing the module would load."""
    names = {name for node in at_import_time(ast.parse(text)) for name in imported(node)}
    return names & HEAVY


def test_the_walk_finds_the_modules():
    names = {p.relative_to(ROOT).as_posix() for p in sources()}
    assert {"meshes/chip.py", "costmodels/simulate.py", "planner/plan.py"} <= names


@pytest.mark.parametrize("path", sources(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_point_down_and_load_nothing_heavy(path):
    text, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()
    assert not upward(name, text)
    assert name in TEMPLATES or not eager(text)


def test_the_checks_can_fail():
    assert upward("meshes/chip.py", "def f():\n    from costmodels.memory import read_memory") == {
        "costmodels"
    }
    assert upward("planner/plan.py", "import cli") == {"cli"}
    assert not upward("planner/plan.py", "import meshes, numpy")
    assert eager("try:\n    import jax.numpy\nexcept ImportError:\n    pass") == {"jax"}
    assert not eager("def f():\n    import jax")
