"""How gradients of products get to who reads them, and what they are made of gets to them."""

from __future__ import annotations

import pytest

import meshes
from planner.export.jax_program import result_program
from planner.export.placement import placement
from planner.planning import plan_model
from planner.sharding.spec import Spec
from planner.source import find


@pytest.mark.slow
def test_programs_say_the_places_between() -> None:
    """XLA gathered 36 GiB on every device of GPT-3's mesh, and the queries' weights twice."""
    model = find("gpt3-175b").load()
    shape = {"data": 4, "model": 128, "extra": 2}
    result = plan_model(model, meshes.logical(meshes.resolve(model.mesh or ""), shape))
    told = placement(result).gradients

    logits = told["logits", "ln_f.out"]
    home = result.specs["ln_f.out"]
    assert logits.made is not None
    assert _moved(logits.made, home) == 2
    assert [_moved(place, home) for place in logits.way] == [1]

    gathered = result.specs["layers.wq.cast~"]
    assert gathered != result.specs["layers.wq.cast"]
    query = told["layers.q", "layers.ln1.out"]
    assert query.through == gathered
    assert query.other == Spec(((), (), ()))
    assert '(P(None, "extra", None), P(None, None, None))' in result_program(result)


def _moved(there: Spec, here: Spec) -> int:
    """Axes that split another dimension there than here."""
    return sum(
        axis in axes for i, parts in enumerate(there.dims) for axis in parts
        for j, axes in enumerate(here.dims) if i != j
    )  # fmt: skip
