"""Casts that TPUs' compiler makes before loops: what remains in these, and that values stay."""

from __future__ import annotations

import numpy as np
import pytest
from random_plans import PlanDrawer, expected, run_plan
from small_models import decoder, step_of, steps, weighted_sum

from planner.graph import expr as ex
from planner.graph.ahead import NARROWED, SLICE, casts_ahead, narrowed_of
from planner.graph.builder import Builder
from planner.graph.core import Graph, Loop, Op
from planner.graph.derive import ACCUMULATE, training_step
from planner.sharding.flow import build_flow
from planner.values import reference

AXES = (("x", 2), ("y", 4))
STEPS = steps()


def in_loops(graph: Graph) -> set[str]:
    """Tensors that loops are given, whole or slice by slice."""
    found = set()
    for loop in graph.loops():
        found.update(loop.shared, (s.outer for s in loop.reads))
    return found


@pytest.mark.parametrize("parts", [1, 2])
def test_every_stack_is_narrowed_once_before_all_loops(parts: int) -> None:
    step = training_step(decoder(remat="full", accumulation_steps=parts), lean=True)
    found = casts_ahead(step)
    tensors = found.all_tensors()
    wide = {n for n in in_loops(found) if tensors[n].role == "parameter"}
    matrices = {t.name for t in found.parameters() if len(t.shape) > 2 and "layers." in t.name}
    assert matrices
    assert set(narrowed_of(found).values()) >= matrices
    assert wide.isdisjoint(matrices)
    assert set(narrowed_of(found)) == {p + NARROWED for p in narrowed_of(found).values()}
    first = next(i for i, n in enumerate(found.nodes) if isinstance(n, Loop))
    before = {n.name for n in found.nodes[:first]}
    assert set(narrowed_of(found)) <= before
    slices = [op for op, _ in found.walk() if op.attrs.get("ahead") == SLICE]
    assert {op.phase for op in slices} == {"forward", "recompute"}
    assert all(tensors[op.ins[0]].dtype == tensors[op.outs[0]].dtype for op in slices)


def test_what_parts_of_the_batch_have_in_common_is_cast_before_them() -> None:
    step = training_step(decoder(accumulation_steps=2))
    found = casts_ahead(step)
    loop = next(n for n in found.nodes if isinstance(n, Loop) and n.name == ACCUMULATE)
    assert "table.cast" in loop.shared
    assert "table" not in loop.shared
    assert "table.cast" in {n.name for n in found.nodes if isinstance(n, Op)}
    assert found.inputs == step.inputs
    assert found.aliases == step.aliases


def twice_read(b: Builder) -> str:
    """A loop that reads its weights narrowed, and as they are."""
    both = ("B", "D")
    x = b.param("x0", (4, 8), both)
    r = b.repeat("loop", 2)
    entry, w = r.enter(x), r.param("w", (8, 8), ("D", "E"))
    h = r.einsum("B D, D E -> B E", entry, w, name="h")
    value = ("tanh", ex.add(ex.x(0), ex.x(1)))
    out = r.map("out", [(h, ("B", "E")), (w, ("D", "E"))], ("B", "E"), value)
    (x,) = r.end_repeat([(x, entry, out)])
    return weighted_sum(b, x)


def test_what_is_also_read_in_full_precision_stays_as_it_is() -> None:
    step = step_of(twice_read)
    assert "loop.w.cast" in {op.name for op, _ in step.walk()}
    assert casts_ahead(step) == step


@pytest.mark.parametrize("name", STEPS)
def test_any_plan_of_it_computes_the_same(name: str) -> None:
    step = STEPS[name]()
    graph = casts_ahead(step)
    inputs = reference.random_inputs(step)
    wanted, flow = expected(step, inputs), build_flow(graph, {})
    drawer = PlanDrawer(flow, AXES)
    for seed in range(3):
        found = run_plan(flow, drawer.draw(seed), inputs)
        assert found.keys() == wanted.keys()
        for output, array in wanted.items():
            np.testing.assert_allclose(found[output], array, rtol=1e-7, atol=1e-9)
