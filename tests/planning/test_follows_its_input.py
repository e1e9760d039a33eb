"""Plans follow what they are asked: less memory changes them, and so does a slow network."""

from __future__ import annotations

from math import inf
from typing import Any

import pytest

import meshes
from costmodels.collectives import collective_seconds
from costmodels.summary import collectives
from meshes.resolve import from_text
from planner import planning
from planner.ilp import Outcome, solve
from planner.model import Model
from planner.modelfile import load_model
from planner.planning import LEAST_MEMORY_GAP, Infeasible, Options, Unsolved, plan_model
from planner.result import Result

TEXT = """
name: follows
training: {batch: 64, optimizer: adamw, remat: full}
architecture:
  {kind: decoder, layers: 2, d_model: 256, d_ff: 1024, heads: 8, head_dim: 32, vocab: 1024,
   sequence: 128}
"""
SHAPE = {"x": 2, "y": 2}


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(TEXT, "follows.yaml")


def test_less_memory_gives_another_plan_that_fits(model: Model) -> None:
    mesh = meshes.logical(meshes.resolve("tpu-v4:1x2x2"), SHAPE)
    free = plan_model(model, mesh)
    limit = int(free.memory.peak_bytes * 0.9)
    tight = plan_model(model, mesh, Options(memory_bytes=limit, headroom=0.0))
    assert tight.fits
    assert tight.memory.peak_bytes <= limit < free.memory.peak_bytes
    assert tight.plan.choices != free.plan.choices or tight.plan.homes != free.plan.homes
    assert tight.plan.proof.objective_s >= free.plan.proof.objective_s


@pytest.mark.parametrize("slow", ["x", "y"])
def test_communication_moves_off_a_slow_axis(model: Model, slow: str) -> None:
    even = plan_model(model, _mesh(""))
    uneven = plan_model(model, _mesh(f"dims: {{{slow}: {{bytes_per_s: 1e6}}}}\n"))
    assert _carried_bytes(uneven, slow) < _carried_bytes(uneven, "y" if slow == "x" else "x")
    assert _carried_bytes(uneven, slow) <= _carried_bytes(even, slow)


def _mesh(change: str) -> meshes.LogicalMesh:
    topology = from_text(f"base: tpu-v4:2x2x1\n{change}", "mesh.yaml")
    return meshes.logical(topology, SHAPE, {"x": {"x": 2}, "y": {"y": 2}})


def _carried_bytes(result: Result, axis: str) -> int:
    rows = collectives(result.program, result.mesh)
    return sum(row.total_bytes for row in rows if axis in row.axes)


def test_what_crosses_a_slow_axis_takes_its_time() -> None:
    """One ring of four over both axes: all that a device lacks passes its links of 1 MB/s."""
    payload = 4e6
    seconds = collective_seconds(_mesh("dims: {x: {bytes_per_s: 1e6}}\n"), "all-gather",
                                 ("x", "y"), payload)  # fmt: skip
    assert seconds == pytest.approx(payload * 3 / 4 / 2e6, rel=1e-3)


def test_what_does_not_fit_needs_nearly_the_least_memory(model: Model) -> None:
    mesh = meshes.logical(meshes.resolve("tpu-v4:1x2x2"), SHAPE)
    with pytest.raises(Infeasible) as caught:
        plan_model(model, mesh, Options(memory_bytes=1_000_000))
    least = caught.value.result.memory.peak_bytes
    assert plan_model(model, mesh, Options(memory_bytes=least, headroom=0.0)).fits
    less = int(least * (1 - LEAST_MEMORY_GAP))
    with pytest.raises(Unsolved):
        plan_model(model, mesh, Options(memory_bytes=less, headroom=0.0, least_memory=False))


def test_few_volumes_on_many_devices_are_split_over_space() -> None:
    """More devices than volumes: blocks of space, whose convolutions hand over their edges."""
    text = """
training: {batch: 2, optimizer: momentum, remat: none}
architecture: {kind: unet, image: [64, 64, 64], channels: 1, classes: 2, width: 32, levels: 2}
"""
    volumes = load_model(text, "volumes.yaml")
    mesh = meshes.logical(meshes.resolve("tpu-v4:2x2x2"), {"x": 8})
    found = plan_model(volumes, mesh)
    halos = [i for i, _ in found.program.instructions() if getattr(i, "shift", 0)]
    assert halos
    # Four times the devices: a quarter of the time, were it not for copies around the edges.
    assert found.timing.compute_s < 0.35 * _on_two_devices(volumes).timing.compute_s


def _on_two_devices(volumes: Model) -> Result:
    mesh = meshes.logical(meshes.resolve("tpu-v4:1x1x2"), {"x": 2})
    return plan_model(volumes, mesh)


def test_no_time_means_no_plan_and_enough_of_it_the_same_plan(model: Model) -> None:
    mesh = meshes.logical(meshes.resolve("tpu-v4:1x2x2"), SHAPE)
    with pytest.raises(Unsolved, match="time limit"):
        plan_model(model, mesh, Options(time_limit_s=0.0))
    timed = plan_model(model, mesh, Options(time_limit_s=600.0))
    assert timed.plan == plan_model(model, mesh).plan


def test_time_that_ends_after_the_first_plan_leaves_that_plan(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the clock ended the solve under the second weighting."""
    solves = []

    def solve_once(*args: Any, **options: Any) -> Outcome:
        solves.append(1)
        if len(solves) > 1:
            return Outcome("time_limit", None, inf, -inf)
        return solve(*args, **options)

    monkeypatch.setattr(planning, "solve", solve_once)
    mesh = meshes.logical(meshes.resolve("tpu-v5e:2x2"), SHAPE)
    found = plan_model(model, mesh, Options(time_limit_s=600.0))
    assert (found.plan.proof.status, found.fits, len(solves)) == ("time_limit", True, 2)
