"""Where axes do not divide dimensions, padding changes no value.

Random plans whose choices split unevenly wherever they can, on virtual devices whose padding holds
no numbers: whatever would add it up, or read it beside a window, would not be a number either.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from random_plans import UnevenDrawer, expected, lowered, outputs, padded_ops
from small_models import odd_steps

from costmodels.program import Block, Compute, Instruction, LoopStep, Program, Step
from planner.sharding.flow import Flow, build_flow
from planner.values import reference

MESHES = {"2x4": (("x", 2), ("y", 4)), "3x2": (("x", 3), ("y", 2)), "8": (("x", 8),)}
DRAWS = 8  # plans per model and mesh: 24 per model
STEPS = odd_steps()


@cache
def prepared(name: str) -> tuple[Flow, dict[str, np.ndarray], dict[str, np.ndarray]]:
    graph = STEPS[name]()
    inputs = reference.random_inputs(graph)
    return build_flow(graph, {}, uneven=True), inputs, expected(graph, inputs)


def assert_same(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for key, array in wanted.items():
        np.testing.assert_allclose(found[key], array, rtol=1e-7, atol=1e-9, err_msg=key)


# Casting padding to positions, and computing with it: nobody reads what comes of it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize(
    "mesh", ["2x4", pytest.param("3x2", marks=pytest.mark.slow),
             pytest.param("8", marks=pytest.mark.slow)],
)  # fmt: skip
@pytest.mark.parametrize("name", STEPS)
def test_any_plan_with_padding_computes_what_the_graph_computes(name: str, mesh: str) -> None:
    flow, inputs, wanted = prepared(name)
    drawer = UnevenDrawer(flow, MESHES[mesh])
    for seed in range(DRAWS):
        plan = drawer.draw(seed)
        assert len(padded_ops(flow, plan)) > 5
        assert_same(outputs(flow, plan, lowered(flow, plan), inputs), wanted)


# ---- the draws are worth something ---------------------------------------------------------------


def kernels(program: Program) -> Iterator[Compute]:
    return (i for i, _ in program.instructions() if isinstance(i, Compute))


def test_every_kind_of_op_is_padded_and_masked() -> None:
    from planner.values.kernels import EVALUATORS

    padded, masked = set(), set()
    for name in STEPS:
        flow, _, _ = prepared(name)
        for mesh in MESHES.values():
            drawer = UnevenDrawer(flow, mesh)
            for seed in range(6):
                plan = drawer.draw(seed)
                padded |= {flow.sites[n].op.kind for n in padded_ops(flow, plan)}
                program = lowered(flow, plan)
                masked |= {
                    (c.kernel.kind, c.kernel.payload.attrs.get("onehot"))
                    for c in kernels(program) if c.kernel.payload.attrs.get("sums")
                }  # fmt: skip
    assert padded == set(EVALUATORS) - {"halo"}
    assert masked == {
        ("map", None), ("map", "take"), ("map", "scatter"), ("conv", None), ("conv_dx", None),
        ("conv_dw", None),
    }  # fmt: skip


def without_masks(program: Program) -> Program:
    return replace(program, block=unmasked(program.block))


def unmasked(block: Block) -> Block:
    def one(i: Instruction) -> Instruction:
        if not isinstance(i, Compute):
            return i
        op = i.kernel.payload
        attrs = {k: v for k, v in op.attrs.items() if k != "sums"}
        return replace(i, kernel=replace(i.kernel, payload=replace(op, attrs=attrs)))

    def step(s: Step) -> Step:
        return replace(s, instructions=tuple(one(i) for i in s.instructions))

    return tuple(
        replace(s, enter=step(s.enter), body=unmasked(s.body)) if isinstance(s, LoopStep)
        else step(s)
        for s in block
    )  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_the_comparison_notices_a_missing_mask(name: str) -> None:
    flow, inputs, wanted = prepared(name)
    drawer = UnevenDrawer(flow, MESHES["2x4"])
    for seed in range(3):
        plan = drawer.draw(seed)
        with pytest.raises((AssertionError, ValueError)):
            assert_same(outputs(flow, plan, without_masks(lowered(flow, plan)), inputs), wanted)
