"""pyproject.toml names every package and data file of the tree, and imports point one way."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from setuptools import Distribution
from setuptools.config.pyprojecttoml import apply_configuration

ROOT = Path(__file__).parents[2]
LAYERS = ("meshes", "costmodels", "planner", "cli")


@pytest.fixture
def distribution(monkeypatch: pytest.MonkeyPatch) -> Distribution:
    monkeypatch.chdir(ROOT)
    return apply_configuration(Distribution(), "pyproject.toml")


def test_every_package_is_listed(distribution: Distribution) -> None:
    tops = (ROOT / layer for layer in LAYERS)
    found = {
        ".".join(folder.relative_to(ROOT).parts)
        for top in tops
        for folder in (file.parent for file in top.rglob("*.py"))
    }
    assert set(distribution.packages) == found


def test_every_data_file_is_listed(distribution: Distribution) -> None:
    listed = {
        file
        for package, patterns in distribution.package_data.items()
        for pattern in patterns
        for file in ROOT.joinpath(*package.split(".")).glob(pattern)
    }
    files = (file for layer in LAYERS for file in (ROOT / layer).rglob("*") if file.is_file())
    assert {file for file in files if file.suffix not in {".py", ".pyc"}} == listed


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_point_one_way(layer: str) -> None:
    above = set(LAYERS[LAYERS.index(layer) + 1 :])
    files = [ROOT / "cli.py"] if layer == "cli" else sorted((ROOT / layer).rglob("*.py"))
    assert files
    for file in files:
        assert not imported(file) & above, file.relative_to(ROOT)


def imported(file: Path) -> set[str]:
    """The first parts of the names of all modules that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module or "")
    return {name.split(".")[0] for name in names}
