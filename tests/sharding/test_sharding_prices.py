"""The ILP's coefficients are prices of the lowered program: seconds and bytes, to the last one.

Random plans are priced twice, by the problem with a memory constraint at every schedule step
and by lowering the whole graph and reading the program.
"""

from __future__ import annotations

import numpy as np
import pytest
from both_prices import ilp_price, lowered_price
from random_plans import PlanDrawer, UnevenDrawer
from small_models import decoder, odd_steps, steps

import meshes
from meshes import LogicalMesh
from planner.graph.builder import is_cast
from planner.graph.core import Graph
from planner.graph.derive import training_step
from planner.sharding.flow import build_flow
from planner.sharding.formulate import Space

STEPS = steps()
LIMIT = 1e18  # any: it makes the problem count bytes
DRAWS = 6


def tpu(topology: str, **shape: int) -> LogicalMesh:
    return meshes.logical(meshes.resolve(topology), shape)


def assert_priced_alike(
    graph: Graph, mesh: LogicalMesh, draws: int, uneven: bool = False
) -> None:
    flow = build_flow(graph, {}, uneven=uneven)
    space = Space(flow, mesh)
    problem = space.problem(LIMIT, range(flow.steps))
    drawer = (UnevenDrawer if uneven else PlanDrawer)(flow, mesh.axes)
    for seed in range(draws):
        plan = drawer.draw(seed)
        by_ilp = ilp_price(space, problem, plan, flow.steps)
        by_program = lowered_price(space, plan)
        assert by_ilp.seconds == pytest.approx(by_program.seconds, rel=1e-9)
        np.testing.assert_array_equal(by_ilp.profile, by_program.profile)


@pytest.mark.parametrize("name", STEPS)
def test_small_models(name: str) -> None:
    assert_priced_alike(STEPS[name](), tpu("tpu-v4:2x2x2", x=2, y=4), DRAWS)


@pytest.mark.parametrize("name", odd_steps())
def test_padded_plans(name: str) -> None:
    mesh = tpu("tpu-v4:2x2x2", x=2, y=4)
    assert_priced_alike(odd_steps()[name](), mesh, DRAWS, uneven=True)


def test_three_axes() -> None:
    mesh = tpu("tpu-v4:2x2x2", model=2, data=2, expert=2)  # names in no order
    assert_priced_alike(STEPS["nested_loops full"](), mesh, 4)


def test_a_decoder_of_lamda_s_size_on_2048_devices() -> None:
    model = decoder(
        batch=256, positions=1024, vocabulary=32000, width=8192, hidden=65536, heads=128,
        head=128, layers_=64, remat="full", optimizer="adafactor",
    )  # fmt: skip
    assert_priced_alike(training_step(model), tpu("tpu-v3:32x32", x=32, y=64), DRAWS)


@pytest.mark.parametrize("name", ["decoder accumulation", "nested_loops full", "conv net"])
def test_the_solution_of_a_problem_is_the_plan_it_says(name: str) -> None:
    """`Space.plan` and the strategies of a plan are inverse to each other."""
    from both_prices import strategies

    flow = build_flow(STEPS[name](), {})
    mesh = tpu("tpu-v4:2x2x2", x=2, y=4)
    space = Space(flow, mesh)
    plan = PlanDrawer(flow, mesh.axes).draw(0)
    assert space.plan(strategies(space, plan), plan.proof) == plan


def test_sums_are_reduced_before_they_are_widened() -> None:
    """As compilers do: f32 gradients of GPT-3 were planned to be reduced in f32, XLA's are bf16."""
    flow = build_flow(training_step(decoder(8, optimizer="adam")), {})
    mesh = tpu("tpu-v4:2x2x2", x=2, y=4)
    free, bound = Space(flow, mesh), Space(flow, mesh, narrow_first=True)
    barred = 0
    for c in flow.conversions:
        was, now = free.spec_costs(c), bound.spec_costs(c)
        pending = np.array([bool(spec.partial) for spec in bound.rows(c.source)[0]])
        if c.source.kind == "result" and c.source.op == "layers.w1[i].grad":
            assert pending.any()
            assert np.isinf(now[pending][was[pending] > 0]).all()
            barred += int(np.isfinite(was[pending]).sum() > np.isfinite(now[pending]).sum())
            np.testing.assert_array_equal(now[~pending], was[~pending])
    assert barred


def test_sums_of_wider_numbers_are_no_casts() -> None:
    graph = training_step(decoder(8, optimizer="adam"))
    casts = {op.name for op, _ in graph.walk() if is_cast(op)}
    assert "layers.w1.cast" in casts
    assert not {name for name in casts if name.endswith(("mean", "sum", "max"))}
