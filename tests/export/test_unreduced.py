"""Gradients that wait for the last microbatch: what the program says, computes and moves."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from random import Random

import pytest
from scaled_zoo import TINY, scaled

import meshes
from meshes import LogicalMesh
from planner.annotations import Axes
from planner.export.jax_program import Source, planned_source
from planner.graph.core import Graph
from planner.graph.derive import ADDED, added_up
from planner.model import Model
from planner.modelfile import load_model
from planner.planning import price_annotations
from planner.sharding.formulate import Unsatisfiable
from planner.verify.compile import compile_program
from planner.verify.hlo import parse
from planner.verify.hlo_reading import read

DATA, MODEL = ("data",), ("model",)
PARTS = 4
SOME_REDUCED = r"REDUCED = \(\s*\""
TEXT = """
training: {batch: B, optimizer: OPTIMIZER, accumulation_steps: 4, reduce_once: true, compute: f32}
graph:
  inputs: {x: "f32[B, S, D]", y: "f32[B, S, D]"}
  params: {w_in: "[D, F]", w_out: "[F, D]", scale: "[D]"}
  ops:
    - h = einsum("B S D, D F -> B S F", x, w_in)
    - o = einsum("B S F, F D -> B S D", relu(h), w_out)
    - z = o * scale
LOSS
dims: {B: 32, S: 8, D: 16, F: 64}
"""
PLAIN = "    - loss = mean(square(z - y)) + 0 * max(y)"  # the same, but groups cannot say it
MEAN = "    - loss = mean(square(z - y))"
# Megatron's feed-forward layer: columns, then rows; the optimizer's states split over data (ZeRO).
LAYOUT: dict[str, Axes] = {
    "x": (DATA, (), ()), "y": (DATA, (), ()), "h": (DATA, (), MODEL), "z": (DATA, (), ()),
    "o": (DATA, (), ()), "w_in": ((), MODEL), "w_out": (MODEL, ()), "scale": ((),),
}  # fmt: skip
# Of one matrix and the scales, gradients are added up in shards; or they wait, of a matrix that
# every part gathers.
MIXED: dict[str, Axes] = {
    "w_in": (DATA, MODEL), "w_in.grad.acc": (DATA, MODEL), "scale": (DATA,),
    "scale.grad.acc": (DATA,),
}  # fmt: skip
GATHERED: dict[str, Axes] = {"w_in": (DATA, MODEL)}
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
    weights, loss = 2 * 16 * 64 * data // 8 + 16, 1
    assert sum(m.bytes for m in reduced) == (weights + loss) * 4


def test_gradients_wait_beside_others_that_do_not() -> None:
    pytest.importorskip("jax")
    source, mesh = written(optimizer="sgd", **MIXED), on(4, 2)
    assert 'REDUCED = ("scale", "w_in")' in source.text
    moves = read(parse(compile_program(source.text, mesh, "cpu").hlo), mesh.axes).collectives
    reduced = [m for m in moves if m.axes == DATA and m.kind in ("all-reduce", "reduce-scatter")]
    matrix, scale, loss = 16 * 64 // 2, 16, 1
    assert sum(m.bytes for m in reduced if m.count == PARTS) == (matrix + scale) * 4
    assert sum(m.bytes for m in reduced if m.count == 1) == (matrix + loss) * 4


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


@pytest.mark.parametrize(
    ("optimizer", "data", "layout"),
    [("adam", 2, {}), ("sgd", 8, {}), ("sgd", 4, MIXED), ("sgd", 4, GATHERED)],
)
def test_two_steps_are_those_of_a_program_that_reduces_every_time(
    optimizer: str, data: int, layout: dict[str, Axes]
) -> None:
    """On eight devices, and without a mesh."""
    pytest.importorskip("jax")
    source = written(optimizer=optimizer, data=data, **layout).text
    assert f'UNREDUCED, GROUPS = ("data",), {data}' in source
    plain = written(PLAIN, optimizer=optimizer, data=data).text
    assert "by_groups" not in plain
    assert_same(source, plain)


def assert_same(grouped: str, plain: str) -> None:
    flags = "--xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(sys.path)], input=json.dumps([grouped, plain]),
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}, text=True,
        capture_output=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.stdout == "same\n", done.stderr[-2000:]


def layout_by_chance(model: Model, step: Graph, chance: Random) -> dict[str, Axes]:
    """Activations by batch; parameters whole or in shards that every part gathers, and gradients
    that wait or are added up in shards."""
    found: dict[str, Axes] = {}
    for name, t in model.graph.all_tensors().items():
        if "B" in t.dims and t.role != "parameter":
            found[name] = tuple(DATA if d == "B" else () for d in t.dims)
    for t in model.graph.parameters():
        shape = t.shape[1:] if t.dims[0] == "layers" else t.shape
        found[t.name] = whole = ((),) * len(shape)
        even = [i for i, n in enumerate(shape) if n % 4 == 0]
        if not even or chance.random() < 0.5:
            continue
        at = chance.choice(even)
        sharded = tuple(DATA if i == at else () for i in range(len(shape)))
        found[t.name] = chance.choice((whole, sharded))
        if found[t.name] == whole or chance.random() < 0.5:
            found[added_up(step, t.name)] = sharded
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt3-175b", "lamda-137b", "mixtral-8x7b", "t5-11b"])
def test_whatever_waits_the_values_are_the_same(name: str) -> None:
    """Two steps of the scaled zoo on eight devices."""
    pytest.importorskip("jax")
    once = "training.reduce_once={}".format
    settings = {**TINY[name], "training.accumulation_steps": PARTS}
    more = ("training.compute=f32", "training.optimizer=sgd")
    plain = price_annotations(scaled(name, settings, 64, *more, once("false")), on(4, 2), {})
    model = scaled(name, settings, 64, *more, once("true"))
    for seed in range(9):
        layout = layout_by_chance(model, plain.graph, Random(f"{name} {seed}"))
        layout = {n: a for n, a in layout.items() if n in plain.specs}
        laid = [n for n in layout if not n.endswith(ADDED)]
        try:
            planned = price_annotations(model, on(4, 2), layout, as_laid=laid)
        except Unsatisfiable:
            continue
        source = planned_source(planned)
        if re.search(SOME_REDUCED, source.text):
            break
    assert source.note == ""
    assert re.search(SOME_REDUCED, source.text)
    assert_same(source.text, planned_source(plain).text)


@pytest.mark.parametrize(
    ("loss", "layout", "reason"),
    [
        # The variance of a batch is no sum over parts of it.
        ("    - s = sum(z, over=[B])\n    - loss = mean(square(s))", {}, "is not linear in a sum"),
        ("    - m = max(z, over=[B])\n    - loss = mean(m)", {}, "takes a maximum"),
        (MEAN, {"h": ((), DATA, MODEL)}, "they split o.relu otherwise"),
    ],
)
def test_what_groups_cannot_do_alone_is_reduced_in_every_part_and_said(
    loss: str, layout: dict[str, Axes], reason: str
) -> None:
    source = written(loss, **layout)
    assert reason in source.note
    assert "Not as planned: gradients" in source.text
    assert "by_groups" not in source.text
