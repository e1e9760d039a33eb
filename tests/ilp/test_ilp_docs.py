"""Every function that docs/solver.md names exists where it says."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "solver.md").read_text()
MODULES = {p.stem for p in (Path(__file__).resolve().parents[2] / "planner/ilp").glob("*.py")}
NAMES = sorted(
    name for name in set(re.findall(r"`(\w+(?:\.\w+)+)`", TEXT)) if name.split(".")[0] in MODULES
)


def test_the_formulation_names_what_builds_it() -> None:
    families = re.findall(r"^\| \w+ \|.*\| `(linearise|milp)\.[\w.]+` \|$", TEXT, re.MULTILINE)
    assert len(families) == 6
    assert len(NAMES) >= 20


@pytest.mark.parametrize("name", NAMES)
def test_named_functions_exist(name: str) -> None:
    module, *path = name.split(".")
    found = importlib.import_module(f"planner.ilp.{module}")
    for part in path:
        found = getattr(found, part)
    assert callable(found)
