"""Copies of what TPUs gather in narrow shards: when there are any, and what they take."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import meshes
from costmodels.memory import read_memory
from costmodels.pricing import instruction_seconds
from costmodels.program import Buffer, Collective, Compute, Kernel, LoopStep, Program, Step
from costmodels.retiling import retile_gathered, retiling_seconds
from costmodels.simulate import simulate
from meshes import LogicalMesh
from planner.planning import plan_model
from planner.source import find

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from tpu_gathers import Case

V3 = meshes.logical(meshes.resolve("tpu-v3:8x8"), {"x": 128})
V4 = meshes.logical(meshes.resolve("tpu-v4:4x8x8"), {"x": 64, "y": 4})
GPU = meshes.logical(meshes.resolve("dgx-a100-80gb:16"), {"x": 128})


def copy_s(mesh: LogicalMesh, shape: tuple[int, ...], dim: int, axes: str = "x") -> float:
    """Of an array of bf16 that was gathered along `dim`."""
    shards, size = 1, 2
    for axis in axes:
        shards *= dict(mesh.axes)[axis]
    for n in shape:
        size *= n
    return float(retiling_seconds(mesh, len(shape), dim, tuple(axes), shape[dim] // shards, size))


@pytest.mark.parametrize(
    ("mesh", "width", "compiled_ms"),
    [(V3, 6, 3.94), (V3, 20, 13.12), (V4, 12, 1.58), (V4, 20, 2.63)],
)
def test_matrices_take_what_the_compiler_estimates(
    mesh: LogicalMesh, width: int, compiled_ms: float
) -> None:
    """libtpu 0.0.52, a product with 49152 rows in shards of so many columns."""
    wide = width * dict(mesh.axes)["x"]
    assert copy_s(mesh, (49152, wide), 1) == pytest.approx(compiled_ms / 1e3, rel=0.2)


@pytest.mark.parametrize(
    ("mesh", "shape", "dim", "axes"),
    [
        (V3, (49152, 8 * 128), 1, "x"),  # whole tiles
        (V3, (6 * 128, 49152), 0, "x"),  # read as it is
        (V3, (1024, 6 * 128), 1, "x"),  # small: gathered by a sum
        (V4, (49152, 3 * 256), 1, "xy"),  # over the whole torus: by a sum
        (GPU, (49152, 6 * 128), 1, "x"),
    ],
)
def test_nothing_is_copied(
    mesh: LogicalMesh, shape: tuple[int, ...], dim: int, axes: str
) -> None:
    assert copy_s(mesh, shape, dim, axes) == 0


def program(width: int) -> Program:
    """Two layers that gather 49152 × (width · 128) numbers of bf16 and add them up."""
    rows, wide = 49152, 128 * width
    buffers = {
        0: Buffer(0, (rows, width), "bf16", "parameters", "w"),
        1: Buffer(1, (rows, wide), "bf16", "collective_buffers", "w"),
        2: Buffer(2, (), "f32", "activations", "sum"),
    }
    gather = Collective("all-gather", ("x",), 0, 1, rows * wide * 2, 1, tensor="w")
    add = Compute(Kernel("sum", "map", "bf16", rows * wide * 2.0, 0.0), (1,), (2,))
    body = (Step("sum", (gather, add)),)
    loop = LoopStep("layers", 2, Step("enter", ()), body, (), (), ())
    return Program(V3.axes, buffers, (loop,), {"w": 0}, {"sum": 2})


def test_a_program_has_them_in_time_and_memory() -> None:
    narrow, copied = program(6), retile_gathered(program(6), V3)
    own, size = copy_s(V3, (49152, 768), 1), 49152 * 768 * 2
    longer = simulate(copied, V3).step_time_s - simulate(narrow, V3).step_time_s
    assert longer == pytest.approx(2 * own)
    assert read_memory(copied).peak_bytes - read_memory(narrow).peak_bytes == size
    assert retile_gathered(program(8), V3) == program(8)


def test_weights_are_split_where_nothing_is_copied() -> None:
    """Of two dimensions that divide by all cores the one in whole tiles: GPT-3 on 2048 cores."""
    model = find("gpt3-175b").load()
    mesh = meshes.logical(meshes.resolve("tpu-v3:32x32"), {"x": 64, "y": 32})
    found = plan_model(model, mesh)
    copies = [
        times * instruction_seconds(mesh, i) for i, times in found.program.instructions()
        if isinstance(i, Compute) and i.kernel.kind == "retile"
    ]  # fmt: skip
    assert sum(copies) < 0.001 * found.timing.step_time_s


@pytest.mark.compiler
@pytest.mark.parametrize(
    ("product", "width"), [("TF,FD->TD", 6), ("TF,FD->TD", 8), ("TD,DF->TF", 6)]
)
def test_the_tpu_compiler_copies_as_predicted(product: str, width: int) -> None:
    pytest.importorskip("libtpu")
    case = Case("tpu-v3:8x8", product, width)
    assert case.predicted_s() == pytest.approx(case.compiled_s(), rel=0.2)
