"""Gradients of every op kind against central differences, through whole training steps."""

from __future__ import annotations

import pytest
from graph_support import CASES, check_gradients, step_of, transformer

from planner.graph.derive import training_step
from planner.graph.vjp import VJPS
from planner.source import find


@pytest.mark.parametrize("case", CASES)
def test_gradients_agree_with_differences(case: str) -> None:
    check_gradients(step_of(CASES[case]))


@pytest.mark.parametrize("remat", ["none", "full", "dots", "attention"])
def test_gradients_through_loops(remat: str) -> None:
    check_gradients(training_step(transformer(remat=remat)))


def test_every_differentiable_kind_has_a_case() -> None:
    kinds = {op.kind for build in CASES.values() for op, _ in step_of(build).walk()}
    assert set(VJPS) <= kinds


def test_whole_numbers_have_no_gradients() -> None:
    """Ring attention carries the number of a block from turn to turn: its gradient was a pass over
    all scores, and kept another from being part of the products beside it."""
    step = training_step(find("llama3-8b", ["architecture.attention_blocks=4"]).load())
    tensors = step.all_tensors()
    carried = {k.entry for loop in step.loops() for k in loop.carries}
    assert any(tensors[name].dtype == "i32" for name in carried)
    made = {out for op, _ in step.walk() if op.phase == "backward" for out in op.outs}
    assert made
    assert all(tensors[name].floating for name in made)
