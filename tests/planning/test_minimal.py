"""The fewest annotations that stand for a plan, against every subset of them."""

from __future__ import annotations

from itertools import combinations

import pytest

import meshes
from planner.annotations import axes_by_name
from planner.minimal import MAX_SLOWDOWN, completed, minimal
from planner.modelfile import load_model
from planner.pins import PinError
from planner.planning import plan_model, price_annotations

TEXT = """
training: {batch: B, optimizer: sgd}
graph:
  inputs: {x: "f32[B, D]", y: "f32[B, D]"}
  params: {w_in: "[D, F]", w_out: "[F, D]"}
  ops:
    - h = einsum("B D, D F -> B F", x, w_in)
    - z = einsum("B F, F D -> B D", relu(h), w_out)
    - loss = mean(square(z - y))
dims: {B: 4096, D: 1024, F: 4096}
"""
ON = meshes.logical(meshes.resolve("dgx-a100-80gb:1x8"), {"data": 4, "model": 2})


def test_none_can_be_dropped_and_no_claim_is_wrong() -> None:
    """By brute force over all subsets of what is left: only the whole of it recovers the plan."""
    result = plan_model(load_model(TEXT, "mlp"), ON)
    found = minimal(result)
    every = axes_by_name(result)
    assert 0 < len(found.annotations) < len(every) == found.count
    assert found.annotations.items() <= every.items()

    def step_time_s(names) -> float:
        axes = completed(result, {n: every[n] for n in names})
        try:
            return price_annotations(result.model, ON, axes).timing.step_time_s
        except PinError:
            return float("inf")

    limit_s = step_time_s(every) * (1 + MAX_SLOWDOWN)
    assert step_time_s(found.annotations) <= limit_s
    for name in found.annotations:
        assert step_time_s(n for n in found.annotations if n != name) > limit_s
    sizes = [
        k for k in range(len(found.annotations) + 1)
        for names in combinations(every, k) if step_time_s(names) <= limit_s
    ]  # fmt: skip
    assert min(sizes) == len(found.annotations)


@pytest.mark.parametrize("name", ["x", "w_in"])
def test_the_completion_keeps_what_is_given(name: str) -> None:
    result = plan_model(load_model(TEXT, "mlp"), ON)
    every = axes_by_name(result)
    assert completed(result, {name: every[name]})[name] == every[name]
