"""Gradients that wait for the last microbatch: what the program says, computes and moves."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import meshes
from meshes import LogicalMesh
from planner.annotations import Axes
from planner.export.jax_program import Source, planned_source
from planner.modelfile import load_model
from planner.planning import price_annotations
from planner.verify.compile import compile_program
from planner.verify.hlo import parse
from planner.verify.hlo_reading import read

DATA, MODEL = ("data",), ("model",)
PARTS = 4
TEXT = """
training: {batch: B, optimizer: OPTIMIZER, accumulation_steps: 4, reduce_once: true, compute: f32}
graph:
  inputs: {x: "f32[B, S, D]", y: "f32[B, S, D]"}
  params: {w_in: "[D, F]", w_out: "[F, D]"}
  ops:
    - h = einsum("B S D, D F -> B S F", x, w_in)
    - z = einsum("B S F, F D -> B S D", relu(h), w_out)
LOSS
dims: {B: 32, S: 8, D: 16, F: 64}
"""
MEAN = "    - loss = mean(square(z - y))"
# Megatron's feed-forward layer: columns, then rows; the optimizer's states split over data (ZeRO).
LAYOUT: dict[str, Axes] = {
    "x": (DATA, (), ()), "y": (DATA, (), ()), "h": (DATA, (), MODEL), "z": (DATA, (), ()),
    "w_in": ((), MODEL), "w_out": (MODEL, ()),
}  # fmt: skip
ZERO = {
    f"{name}.{moment}": axes for moment in ("m", "v")
    for name, axes in (("w_in", (DATA, MODEL)), ("w_out", (MODEL, DATA)))
}  # fmt: skip


def on(data: int, model: int) -> LogicalMesh:
    topology = meshes.resolve(f"dgx-a100-80gb:1x{data * model}")
    return meshes.logical(topology, {"data": data, "model": model})


def written(loss: str = MEAN, optimizer: str = "adam", data: int = 4, **layout: Axes) -> Source:
    text = TEXT.replace("LOSS", loss).replace("OPTIMIZER", optimizer)
    given = {**LAYOUT, **(ZERO if optimizer == "adam" else {}), **layout}
    model = load_model(text, "mlp")
    laid = LAYOUT.keys() - layout.keys()
    return planned_source(price_annotations(model, on(data, 8 // data), given, as_laid=laid))


@pytest.mark.parametrize(("optimizer", "data"), [("adam", 4), ("sgd", 4), ("adam", 8)])
def test_gradients_are_reduced_once_a_step(optimizer: str, data: int) -> None:
    """XLA's own collectives over data: one reduction of each gradient, outside of the loop."""
    pytest.importorskip("jax")
    source, mesh = written(optimizer=optimizer, data=data), on(data, 8 // data)
    assert source.note == ""
    compiled = compile_program(source.text, mesh, "cpu")
    moves = read(parse(compiled.hlo), mesh.axes).collectives
    over_data = [m for m in moves if "data" in m.axes]
    reduced = [m for m in over_data if m.kind in ("all-reduce", "reduce-scatter")]
    assert reduced
    assert all(m.count == 1 for m in over_data)
    weights, loss = 2 * 16 * 64 * 4 * data // 8, 4
    assert sum(m.bytes for m in reduced) == weights + loss


RUN = """
import json, sys
import jax
import numpy as np
sys.path[:0] = json.loads(sys.argv[1])
from on_cpu import load

def steps(source, sharded):
    program = load(source)
    mesh = program["make_mesh"](jax.devices("cpu"))
    params, states = program["initialise"](jax.random.key(0), mesh)
    batch = program["random_batch"](jax.random.key(1), mesh)
    if not sharded:
        params, states, batch = jax.device_get((params, states, batch))
    step = jax.jit(program["train_step"], static_argnums=3)
    for _ in range(2):
        loss, params, states = step(params, states, batch, mesh if sharded else None)
    return loss, params, states

grouped, plain = json.load(sys.stdin)
expected = jax.tree.leaves(steps(plain, False))
for sharded in (False, True):
    for found, right in zip(jax.tree.leaves(steps(grouped, sharded)), expected, strict=True):
        scale = np.abs(right).max()
        np.testing.assert_allclose(found, right, rtol=0, atol=1e-5 * scale)
print("same")
"""


@pytest.mark.parametrize(("optimizer", "data"), [("adam", 2), ("sgd", 8)])
def test_two_steps_are_those_of_a_program_that_reduces_every_time(
    optimizer: str, data: int
) -> None:
    """On eight devices, and without a mesh. Without groups, the annotations of one hold for all:
    values are the same."""
    pytest.importorskip("jax")
    source = written(optimizer=optimizer, data=data).text
    assert f'UNREDUCED, GROUPS = ("data",), {data}' in source
    plain = source.replace("by_groups(microbatches, batch, mesh)", "microbatches(batch)")
    assert plain != source
    flags = "--xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(sys.path)], input=json.dumps([source, plain]),
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}, text=True,
        capture_output=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.stdout == "same\n", done.stderr[-2000:]


@pytest.mark.parametrize(
    ("loss", "layout", "reason"),
    [
        # The variance of a batch is no sum over parts of it.
        ("    - s = sum(z, over=[B])\n    - loss = mean(square(s))", {}, "is not linear in a sum"),
        ("    - m = max(z, over=[B])\n    - loss = mean(m)", {}, "takes a maximum"),
        (MEAN, {"h": ((), DATA, MODEL)}, "they split z.relu otherwise"),
    ],
)
def test_what_groups_cannot_do_alone_is_reduced_in_every_part_and_said(
    loss: str, layout: dict[str, Axes], reason: str
) -> None:
    source = written(loss, **layout)
    assert reason in source.note
    assert "Not as planned: gradients" in source.text
    assert "by_groups" not in source.text
