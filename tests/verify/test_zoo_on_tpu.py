"""Zoo models at full size, planned, compiled by XLA's TPU compiler for their own machine, and
compared. Those that compile in about a minute; benchmarks/verify_zoo.py does them all."""

from __future__ import annotations

import pytest

from planner import source
from planner.request import Request, plan
from planner.verify import text, verify


@pytest.mark.compiler
@pytest.mark.parametrize("name", ["glam-1.2t", "gshard-m4", "t5-11b", "vit-22b"])
def test_prediction_is_within_every_threshold(name: str) -> None:
    """Arguments 1 %, peak 15 %, FLOPs 2 %, compute time 15 %, collectives by kind and axis 25 %."""
    pytest.importorskip("libtpu")
    v = verify(plan(Request(source.find(name))).result)
    assert v.compiled.status == "compiled"
    assert len(v.rows) == 5
    assert any(r.threshold is not None for r in v.collectives)
    assert v.ok, text(v)
