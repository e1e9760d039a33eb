"""Gradients of every op kind against central differences, through whole training steps."""

from __future__ import annotations

import pytest
from graph_support import CASES, check_gradients, step_of, transformer

from planner.graph.derive import training_step
from planner.graph.vjp import VJPS


@pytest.mark.parametrize("case", CASES)
def test_gradients_agree_with_differences(case: str) -> None:
    check_gradients(step_of(CASES[case]))


@pytest.mark.parametrize("remat", ["none", "full", "dots", "attention"])
def test_gradients_through_loops(remat: str) -> None:
    check_gradients(training_step(transformer(remat=remat)))


def test_every_differentiable_kind_has_a_case() -> None:
    kinds = {op.kind for build in CASES.values() for op, _ in step_of(build).walk()}
    assert set(VJPS) <= kinds
