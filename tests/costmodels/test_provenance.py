"""Every parameter of an efficiency table says how it came about, and names a source."""

from __future__ import annotations

import ast
from importlib.resources import files
from pathlib import Path

import pytest
import yaml

import costmodels
from costmodels.compute import from_data
from meshes.document import MARKS

DATA = files("costmodels") / "data"
TABLES = sorted(f.name for f in DATA.iterdir() if f.name != "spread.yaml")
SMALL = (0, 0.5, *range(1, 9))
ABOUT = {"schema_version", "sources", "marks", "fit_error", "sizes"}


def load(name: str) -> dict:
    return yaml.safe_load((DATA / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", TABLES)
def test_every_parameter_has_one_mark_and_a_known_source(name: str) -> None:
    data = load(name)
    from_data(data)  # it is a table
    marked = [
        (parameter, mark, source)
        for mark, by_source in data["marks"].items()
        for source, parameters in by_source.items()
        for parameter in parameters
    ]
    assert sorted(p for p, _, _ in marked) == sorted(set(data) - ABOUT)
    assert {mark for _, mark, _ in marked} <= set(MARKS)
    assert {source for _, _, source in marked} == set(data["sources"])


@pytest.mark.parametrize("name", TABLES)
def test_what_is_derived_from_another_table_is_what_stands_there(name: str) -> None:
    data = load(name)
    for parameter in data["marks"].get("derived", {}).get("a100", ()):
        assert data[parameter] == load("a100.yaml")[parameter]


def test_numbers_in_code_are_no_rates() -> None:
    """What the cost model knows of a machine is data; in code stand small whole numbers, and what
    has a name of its own at the top of its module."""
    found = []
    for path in sorted(Path(costmodels.__file__).parent.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        apart = [n for n in tree.body if isinstance(n, ast.Assign)]
        apart += [d for n in ast.walk(tree) for d in getattr(n, "decorator_list", ())]
        named = {id(part) for node in apart for part in ast.walk(node)}
        numbers = [
            n for n in ast.walk(tree)
            if isinstance(n, ast.Constant) and isinstance(n.value, int | float)
            and id(n) not in named
        ]  # fmt: skip
        found += [(path.name, n.lineno, n.value) for n in numbers if n.value not in SMALL]
    assert not found
