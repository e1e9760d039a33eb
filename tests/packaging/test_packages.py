"""pyproject.toml names every package and every data file of the tree."""

from __future__ import annotations

from pathlib import Path

import pytest
from setuptools import Distribution
from setuptools.config.pyprojecttoml import apply_configuration

ROOT = Path(__file__).parents[2]
LAYERS = ("meshes", "costmodels", "planner", "cli")


# Setuptools reads its own table with a warning that the table may still change.
pytestmark = pytest.mark.filterwarnings("ignore:Support for `.tool.setuptools.`")


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
