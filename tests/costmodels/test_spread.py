"""Ranges of step times belong to tables that exist, and mean something."""

from __future__ import annotations

from importlib.resources import files

import yaml

from costmodels.compute import efficiency
from costmodels.spread import spread


def test_every_range_is_of_a_table() -> None:
    text = (files("costmodels") / "data" / "spread.yaml").read_text(encoding="utf-8")
    tables = yaml.safe_load(text)["tables"]
    assert tables
    for name in tables:
        efficiency(name)  # raises for a name that is none
        found = spread(name)
        assert found is not None
        low, high = found
        assert 0.5 < low < high < 2


def test_no_range_where_nobody_has_compared() -> None:
    assert spread("tpu-v7") is None
