"""What propagation cannot know: answers by hand, and what avoiding it costs in the ILP."""

from __future__ import annotations

import numpy as np
import pytest
from both_prices import strategies
from random_plans import PlanDrawer
from small_models import decoder

import meshes
from planner import source
from planner.graph.derive import step_of, training_step
from planner.ilp.evaluate import evaluate
from planner.modelfile import load_model
from planner.planning import agreeing_plan, plan_model
from planner.sharding.agreement import DISPUTE, DISPUTE_OF_WEIGHT, Agreement
from planner.sharding.flow import build_flow
from planner.sharding.formulate import Space
from planner.sharding.spec import Spec

TEXT = """
training: {batch: B, optimizer: adam}
graph:
  inputs: {x: "f32[B, D]", y: "f32[B, D]"}
  params: {w_in: "[D, F]", w_out: "[F, D]"}
  ops:
    - h = einsum("B D, D F -> B F", x, w_in)
    - z = einsum("B F, F D -> B D", relu(h), w_out)
    - loss = mean(square(z - y))
dims: {B: 32, D: 256, F: 1024}
"""
AGREEMENT = Agreement(step_of(load_model(TEXT, "mlp")))
NO, X, Y, XY = (), ("x",), ("y",), ("x", "y")


@pytest.mark.parametrize(
    ("tensor", "lies", "read", "disputes"),
    [
        ("x", (X, Y), (X, Y), 0),
        ("x", (NO, NO), (X, NO), 0),  # split further
        ("x", (X, NO), (XY, NO), 0),
        ("x", (X, Y), (X, NO), 0),  # what is summed over is gathered
        ("x", (X, NO), (NO, NO), DISPUTE),  # rows are not followed
        ("x", (X, NO), (Y, NO), DISPUTE),
        ("w_in", (Y, X), (NO, X), 0),  # stored in pieces
        ("w_in", (NO, X), (NO, NO), DISPUTE_OF_WEIGHT),  # its columns are not followed
        ("w_in", (XY, NO), (X, NO), DISPUTE),  # summed over by one axis, gathered along another
        ("w_in", (X, NO), (NO, X), DISPUTE),  # the axis leaves the sum
        ("h", (X, Y), (X, NO), 0),  # summed over after a pointwise op
        ("z", (X, Y), (X, NO), DISPUTE),  # nobody sums over it
    ],
)
def test_disputes_by_hand(tensor, lies, read, disputes) -> None:
    assert AGREEMENT.between(tensor, Spec(lies), Spec(read)) == disputes


def test_an_axis_that_leaves_a_sum() -> None:
    assert AGREEMENT.leaves_sum("w_in", Spec((X, NO)), Spec((NO, X)))
    assert not AGREEMENT.leaves_sum("w_in", Spec((X, NO)), Spec((NO, Y)))
    assert not AGREEMENT.leaves_sum("w_in", Spec((NO, X)), Spec((X, NO)))


def test_a_solution_costs_its_disputes_more() -> None:
    """On random plans: the two problems differ by what `disputes` counts, nothing else."""
    model = decoder(batch=8, width=16, hidden=32)
    mesh = meshes.logical(meshes.resolve("tpu-v4:2x2x2"), {"x": 2, "y": 4})
    flow = build_flow(training_step(model), {})
    space = Space(flow, mesh)
    plain, counting = space.problem(None, []), space.problem(None, [], dispute_s=0.25)
    drawer = PlanDrawer(flow, mesh.axes)
    counts = []
    for seed in range(8):
        chosen = strategies(space, drawer.draw(seed))
        counts.append(space.disputes(chosen))
        more = evaluate(counting, np.array(chosen)).cost - evaluate(plain, np.array(chosen)).cost
        assert more == pytest.approx(0.25 * counts[-1])
    assert max(counts) > 0


def test_a_plan_of_lamda_that_leaves_less_open_and_is_as_fast() -> None:
    model = load_model(source.find("lamda-137b").text, "lamda-137b")
    mesh = meshes.logical(meshes.resolve("tpu-v3:32x32"), {"x": 32, "y": 64})
    fast = plan_model(model, mesh)
    agreeing = agreeing_plan(model, mesh, None, 0.003 * fast.timing.step_time_s)
    space = Space(build_flow(step_of(model), {}), mesh)
    counts = [space.disputes(strategies(space, r.plan)) for r in (agreeing, fast)]
    assert counts[0] < counts[1]
    assert fast.timing.step_time_s * 0.999 <= agreeing.timing.step_time_s
    assert agreeing.timing.step_time_s <= fast.timing.step_time_s * 1.01
