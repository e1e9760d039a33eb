"""What the integer program counts too little of is left out, round by round."""

from __future__ import annotations

from small_models import decoder

import meshes
from costmodels.memory import Memory
from planner.planning import Options, Planning


def test_a_plan_beyond_the_limit_is_excluded_at_once() -> None:
    mesh = meshes.logical(meshes.resolve("tpu-v3:2x1"), {"x": 4})
    planning = Planning(decoder(batch=8), mesh, Options(), {}, None)
    target, counted = 100.0, 60.0
    memory = Memory(110, {}, "step", (110,), ())
    planning.constrain(memory, target, counted)
    assert planning.active == [0]
    assert planning.slack == 0
    planning.constrain(memory, target, counted)
    assert target - planning.slack < counted
    less = planning.slack
    planning.constrain(Memory(105, {}, "step", (105,), ()), target, 49.0)
    assert planning.slack == less + 6
