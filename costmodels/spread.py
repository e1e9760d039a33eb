"""How far measured step times were from predicted ones, per efficiency table.

Data with their source: `data/spread.yaml`, made from the even half of the validation runs.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files

import yaml


@cache
def spread(table: str) -> tuple[float, float] | None:
    """Measured over predicted step time: four of five runs lay between these. None for a table
    that no run has been compared with."""
    text = (files("costmodels") / "data" / "spread.yaml").read_text(encoding="utf-8")
    found = yaml.safe_load(text)["tables"].get(table)
    return None if found is None else (float(found[0]), float(found[1]))
