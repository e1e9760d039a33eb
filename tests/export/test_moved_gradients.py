"""Gradients of weights that the plan makes with an axis in another dimension than the weight's."""

from __future__ import annotations

import pytest

import meshes
from planner.export.placement import placement
from planner.planning import plan_model
from planner.source import find


@pytest.mark.slow
def test_they_are_told_where_they_are_made() -> None:
    """On GPUs XLA made the whole gradient of GPT-3's queries on every device otherwise."""
    model = find("gpt3-175b").load()
    mesh = meshes.logical(meshes.resolve(model.mesh or ""), {"data": 256, "model": 4})
    result = plan_model(model, mesh)
    told = placement(result).gradients
    moved = 0
    for kind in "qkv":
        op, weight = f"layers.{kind}", f"layers.w{kind}.cast"
        maker = next(o for o, _ in result.graph.walk() if o.outs[0] == f"{weight}.grad")
        made = result.plan.choices[maker.name].result(maker.rule, 0, ["data", "model"])
        home = result.specs[weight]
        if made.dims[1] == ("model",) and "model" in home.dims[0]:
            moved += 1
            assert told[op, weight].made == made.without_partial()
    assert moved
