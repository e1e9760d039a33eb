"""Lowered programs mean what the single-device graph means, whatever the plan.

Random plans of every kind of model run on eight virtual devices; the loss, every new parameter
and every new optimizer state must be those of the graph evaluated whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from random_plans import PlanDrawer, expected, lowered, outputs, run_plan
from small_models import steps

from costmodels.program import Block, Collective, LoopStep, Program, Step
from planner.graph.core import Graph
from planner.sharding.flow import Flow, build_flow
from planner.values import reference

MESHES = {
    "2x4": (("x", 2), ("y", 4)),
    "2x2x2": (("y", 2), ("z", 2), ("x", 2)),  # names in no order
    "8": (("x", 8),),
}
DRAWS = 7  # plans per model and mesh: 21 per model
STEPS = steps()


@cache
def prepared(name: str) -> tuple[Graph, Flow, dict[str, np.ndarray], dict[str, np.ndarray]]:
    graph = STEPS[name]()
    inputs = reference.random_inputs(graph)
    return graph, build_flow(graph, {}), inputs, expected(graph, inputs)


def assert_same(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-7, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", STEPS)
def test_any_plan_computes_what_the_graph_computes(name: str, mesh: str) -> None:
    graph, flow, inputs, wanted = prepared(name)
    assert set(wanted) == set(graph.outputs)
    drawer = PlanDrawer(flow, MESHES[mesh])
    for seed in range(DRAWS):
        assert_same(run_plan(flow, drawer.draw(seed), inputs), wanted)


def test_the_models_hold_every_kind_of_op() -> None:
    from planner.values.kernels import EVALUATORS

    kinds = {op.kind for name in STEPS for op, _ in prepared(name)[0].walk()}
    assert kinds == set(EVALUATORS) - {"halo"}  # which only lowering makes
    optimizers = {t.name.rpartition(".")[2] for n in STEPS for t in prepared(n)[0].tensors.values()
                  if t.role == "state"}  # fmt: skip
    assert {"m", "v", "vr", "vc"} <= optimizers


# ---- the draws are worth something ---------------------------------------------------------------


def test_draws_are_diverse() -> None:
    """All plans differ, every decision that can differ does, and every collective occurs."""
    _, flow, _, _ = prepared("decoder full adafactor")
    drawer = PlanDrawer(flow, MESHES["2x2x2"])
    plans = [drawer.draw(seed) for seed in range(12)]
    assert len({(tuple(p.choices.values()), tuple(p.homes.values())) for p in plans}) == len(plans)
    taken = defaultdict(set)
    for plan in plans:
        for name, choice in plan.choices.items():
            taken["op", name].add(choice)
        for home in flow.homes:
            taken["home", home.id].add(plan.homes[home.tensor])
    for node, options in drawer.options.items():
        assert len(taken[node]) > 1 or len(options) == 1, node
    found = {i.kind for p in plans for i in collectives(lowered(flow, p))}
    assert found == {
        "all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute",
        "slice", "mask",
    }  # fmt: skip


def collectives(program: Program) -> list[Collective]:
    return [i for i, _ in program.instructions() if isinstance(i, Collective)]


@pytest.mark.parametrize("kind", ["all-gather", "reduce-scatter", "all-reduce", "slice"])
def test_the_comparison_notices_a_wrong_collective(kind: str) -> None:
    """With one collective of a program made wrong, some output is."""
    _, flow, inputs, wanted = prepared("decoder dots momentum")
    drawer = PlanDrawer(flow, MESHES["2x2x2"])
    noticed = 0
    for seed in range(4):
        plan = drawer.draw(seed)
        program = lowered(flow, plan)
        victim = next(c for c in collectives(program) if c.kind == kind)
        broken = replace(program, block=wrong(program.block, victim))
        try:
            assert_same(outputs(flow, plan, broken, inputs), wanted)
        except (AssertionError, ValueError):
            noticed += 1
    assert noticed >= 3  # a slice of equal numbers may be any of them


def wrong(block: Block, victim: Collective) -> Block:
    """`block` in which `victim` takes the pieces of its first device for those of all."""

    def step(s: Step) -> Step:
        return replace(s, instructions=tuple(_spoilt(i, victim) for i in s.instructions))

    return tuple(
        replace(s, enter=step(s.enter), body=wrong(s.body, victim))
        if isinstance(s, LoopStep)
        else step(s)
        for s in block
    )


def _spoilt(instruction: object, victim: Collective) -> object:
    if instruction is not victim:
        return instruction
    if victim.kind == "slice":  # the blocks of another axis
        other = next(a for a in ("x", "y", "z") if a not in victim.axes)
        return replace(victim, axes=(other,))
    if victim.kind == "all-gather":
        return replace(victim, kind="collective-permute", order=victim.axes)
    return replace(victim, reduce="max")
