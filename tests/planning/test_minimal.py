"""The fewest annotations that stand for a plan, against every subset of them."""

from __future__ import annotations

from itertools import combinations

import pytest

import meshes
from planner import source
from planner.annotations import axes_by_name
from planner.minimal import MAX_GROWTH, MAX_SLOWDOWN, completed, minimal
from planner.modelfile import load_model
from planner.pins import PinError
from planner.planning import plan_model, price_annotations
from planner.request import Request, plan
from planner.verify import DEFAULT_TIMEOUT_S, recovered, recovered_text

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
ON = meshes.logical(meshes.resolve("tpu-v3:2x2"), {"data": 4, "model": 2})


def test_none_can_be_dropped_and_no_claim_is_wrong() -> None:
    """By brute force over all subsets of what is left: only the whole of it recovers the plan."""
    result = plan_model(load_model(TEXT, "mlp"), ON)
    found = minimal(result)
    every = axes_by_name(result)
    assert 0 < len(found.annotations) < len(every) == found.count
    assert found.annotations.items() <= every.items()

    def amounts(names) -> tuple[float, float]:
        axes = completed(result, {n: every[n] for n in names})
        try:
            priced = price_annotations(result.model, ON, axes)
        except PinError:
            return float("inf"), float("inf")
        return priced.timing.step_time_s, priced.memory.peak_bytes

    limit_s, limit_bytes = amounts(every)

    def recovers(names) -> bool:
        time_s, peak_bytes = amounts(names)
        slower, larger = time_s / limit_s - 1, peak_bytes / limit_bytes - 1
        return slower <= MAX_SLOWDOWN and larger <= MAX_GROWTH

    assert recovers(found.annotations)
    smaller = (
        names for k in range(len(found.annotations)) for names in combinations(every, k)
    )
    assert not any(recovers(names) for names in smaller)


@pytest.mark.parametrize("name", ["x", "w_in"])
def test_the_completion_keeps_what_is_given(name: str) -> None:
    result = plan_model(load_model(TEXT, "mlp"), ON)
    every = axes_by_name(result)
    assert completed(result, {name: every[name]})[name] == every[name]


@pytest.mark.compiler
@pytest.mark.parametrize("name", ["lamda-137b", "gshard-m4"])
def test_xla_recovers_the_plan_from_at_most_ten(name: str) -> None:
    """At full size on 2048 TPU v3 cores: memory within 5 %, collectives within 25 %."""
    pytest.importorskip("libtpu")
    planned = plan(Request(source.find(name)))
    found = minimal(planned.result, planned.options)
    assert 0 < len(found.annotations) <= 10
    assert found.result.timing.step_time_s <= planned.result.timing.step_time_s * (1 + MAX_SLOWDOWN)
    both = recovered(planned.result, found, None, None, DEFAULT_TIMEOUT_S)
    assert len([r for r in both.judged if r.threshold is not None]) >= 4
    assert both.ok, recovered_text(both)
