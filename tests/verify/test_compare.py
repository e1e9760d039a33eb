"""Comparison, normal form of collectives, targets and messages of compilers."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_models import decoder
from verify_support import BATCH, FLOPS, SPECS, mesh, mlp

import meshes
from costmodels.program import Buffer, Collective, Compute, Kernel, Program, Step
from planner.export.jax_program import jax_program
from planner.export.placement import Placement, placement
from planner.graph.builder import Builder
from planner.graph.core import Op
from planner.planning import price_annotations
from planner.verify import BackendError, Thresholds, document, text, verify
from planner.verify.compare import (
    Row,
    collective_rows,
    predicted_moves,
    summary,
    written_flops,
)
from planner.verify.compile import compile_program, needed_bytes
from planner.verify.hlo import parse
from planner.verify.hlo_reading import read
from planner.verify.normalise import Moved, normalised
from planner.verify.targets import gpu_config, target

SIZES = {"x": 2, "y": 4}
DEVICES = 8

# ---- rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("predicted", "compiled", "error", "exceeded"),
    [
        (110, 100, 0.1, False), (120, 100, 0.2, True), (80, 100, -0.2, True),
        (0, 0, 0.0, False), (5, 0, math.inf, True), (None, 100, None, False),
    ],
)  # fmt: skip
def test_row(predicted: float, compiled: float, error: float, exceeded: bool) -> None:
    row = Row("r", "B", predicted, compiled, 0.15)
    assert row.error == (None if error is None else pytest.approx(error))
    assert row.exceeded is exceeded
    assert not Row("r", "B", predicted, compiled).exceeded  # without a threshold nothing is


def test_small_collectives_are_not_judged_and_large_ones_are() -> None:
    predicted = {("all-gather", ("x",)): 100.0, ("all-to-all", ("y",)): 2.0}
    compiled = {("all-gather", ("x",)): 1000.0}
    rows = collective_rows(predicted, compiled, Thresholds())
    assert [(r.name, r.exceeded) for r in rows] == [
        ("all-gather over x", True), ("all-to-all over y", False),
    ]  # fmt: skip


def test_a_planned_sum_of_which_only_slices_are_read_is_a_reduce_scatter() -> None:
    """Rule 5 holds for both sides: sums over two axes that end in two dimensions are planned as
    an all-reduce and slices. Where somebody reads all of the sum it is none."""
    shapes = {0: (8,), 1: (8,), 2: (4,), 3: (8,)}
    buffers = {n: Buffer(n, shape, "f32", "temporaries", "t") for n, shape in shapes.items()}
    total = Collective("all-reduce", ("x",), 0, 1, 32)
    taken = Collective("slice", ("x",), 1, 2, 32, dim=0)
    whole = Compute(Kernel("k", "map", "f32", 64, 8), (1,), (3,))
    found = []
    for readers in ((taken,), (taken, whole)):
        block = (Step("s", (total, *readers)),)
        program = Program((("x", 2),), buffers, block, {"a": 0}, {"b": 2})
        found.append(normalised(predicted_moves(program), SIZES))
    assert found[0] == {("reduce-scatter", ("x",)): 32}
    assert found[1] == {("reduce-scatter", ("x",)): 32, ("all-gather", ("x",)): 32}


def test_a_gather_that_the_program_writes_as_a_product_counts_as_one() -> None:
    b = Builder()
    mask, x = b.input("mask", (4, 6), ("T", "S"), "f32"), b.input("x", (6, 8), ("S", "D"), "f32")
    picked = b.einsum("T S, S D -> T D", mask, x, name="picked", attrs={"picks": ("T", "S")})
    op = b.nodes[-1]
    assert isinstance(op, Op)
    assert op.outs == (picked,)
    assert written_flops(Kernel("picked", "map", "f32", 1, 0, None, op)) == 2 * 4 * 6 * 8
    assert written_flops(Kernel("other", "map", "f32", 1, 0, (1, 2, 3, 4))) == 2 * 24


def test_summary_is_the_median_and_the_worst_of_judged_rows() -> None:
    rows = [Row("a", "B", 110, 100, 1), Row("b", "B", 80, 100, 1), Row("c", "B", 9, 1)]
    assert summary(rows) == {"median": pytest.approx(0.15), "worst": pytest.approx(0.2)}
    assert summary(rows[2:]) == {"median": None, "worst": None}


# ---- normal form ---------------------------------------------------------------------------------


def test_all_reduce_is_scatter_and_gather() -> None:
    assert normalised([Moved("all-reduce", ("y",), 8.0)], SIZES) == {
        ("reduce-scatter", ("y",)): 8.0, ("all-gather", ("y",)): 8.0,
    }  # fmt: skip


def test_gather_over_two_axes_is_two_gathers() -> None:
    joint = normalised([Moved("all-gather", ("x", "y"), 64.0)], SIZES)
    apart = normalised(
        [Moved("all-gather", ("y",), 32.0), Moved("all-gather", ("x",), 64.0)], SIZES
    )
    assert joint == apart


def test_windowed_einsum_is_the_collective_it_replaces() -> None:
    """Over 4 devices a gather of 32 bytes sends 3 shards, a reduce-scatter 5."""
    gather = [Moved("collective-permute", ("y",), 24.0, "all-gather")]
    assert normalised(gather, SIZES) == {("all-gather", ("y",)): 32.0}
    scatter = [Moved("collective-permute", ("y",), 40.0, "reduce-scatter")]
    assert normalised(scatter, SIZES) == {("reduce-scatter", ("y",)): 32.0}
    other = [Moved("collective-permute", ("y",), 6.0)]
    assert normalised(other, SIZES) == {("collective-permute", ("y",)): 6.0}


MOVES = st.builds(
    Moved,
    st.sampled_from(["all-gather", "reduce-scatter", "all-to-all", "collective-permute"]),
    st.sampled_from([("x",), ("y",), ("x", "y"), ("y/2",)]),
    st.integers(1, 1000).map(float),
)


@given(st.lists(MOVES, max_size=5), st.lists(MOVES, max_size=5))
def test_normal_form_is_additive(first: list[Moved], second: list[Moved]) -> None:
    """Combined collectives move the sum: the order and the grouping do not matter."""
    together = normalised([*second, *first], SIZES)
    one, two = normalised(first, SIZES), normalised(second, SIZES)
    for key in {*one, *two}:
        assert together[key] == pytest.approx(one.get(key, 0) + two.get(key, 0))
    assert together.keys() == {*one, *two}


# ---- targets and messages ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "topology"),
    [
        ("tpu-v3:4x4", {"x": 32}, "v3:4x4"),
        ("tpu-v4:4x4x4", {"x": 64}, "v4:4x4x4"),
        ("tpu-v5p:2x2x1", {"x": 4}, "v5p:2x2x1"),
        ("tpu-v7:2x2x1", {"x": 8}, "tpu7x:2x2x1"),
    ],
)
def test_tpu_topology_names(name: str, shape: dict[str, int], topology: str) -> None:
    found = target(meshes.logical(meshes.resolve(name), shape), "tpu").topology
    assert found["topology_name"] == topology
    assert ("chip_config_name" in found) == name.startswith("tpu-v4")


def test_gpu_topology_and_device_description() -> None:
    goal = target(meshes.logical(meshes.resolve("dgx-a100-80gb:16x8"), {"x": 128}), "gpu")
    assert goal.topology["topology"] == "1x16x8"
    config = gpu_config(meshes.resolve("dgx-h100:1").chip)
    assert "core_count: 132" in config
    assert "major: 9" in config


@pytest.mark.parametrize(
    ("name", "shape", "backend", "message"),
    [
        ("tpu-v3:4x4", {"x": 32}, "gpu", "no GPU machine"),
        ("dgx-h100:1", {"x": 8}, "tpu", "no TPU machine"),
        ("tpu-v3:32x32", {"x": 2048}, "cpu", "too many"),
        ("tpu-v3:4x4", {"x": 32}, "wasm", "no backend 'wasm'"),
    ],
)
def test_unsuitable_backends(
    name: str, shape: dict[str, int], backend: str, message: str
) -> None:
    with pytest.raises(BackendError, match=message) as caught:
        target(meshes.logical(meshes.resolve(name), shape), backend)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.48G hbm.",
         int(20.5 * 2**30)),
        ("RESOURCE_EXHAUSTED: Used 512.0M of 100M", 512 * 2**20),
        ("RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: the total memory required for HLO "
         "temporaries (31.50G) exceeds available HBM (15.75G).", int(31.5 * 2**30)),
        ("RESOURCE_EXHAUSTED: no figures", None),
    ],
)  # fmt: skip
def test_needed_bytes(message: str, needed: int | None) -> None:
    assert needed_bytes(message) == needed


def test_python_that_does_not_exist() -> None:
    m = mesh("dgx-a100-80gb:1x8")
    with pytest.raises(BackendError, match="cannot run /no/such/python"):
        compile_program("", m, "cpu", "/no/such/python")


def test_environment_without_jax(tmp_path: Path) -> None:
    """A bare interpreter: the message names the package and how to install it."""
    bare = tmp_path / "python"
    bare.write_text(f"#!/bin/sh\nexec {sys.executable} -S -I \"$@\"\n", encoding="utf-8")
    bare.chmod(0o755)
    m = mesh("dgx-a100-80gb:1x8")
    with pytest.raises(BackendError, match="not installed") as caught:
        compile_program(jax_program(mlp(), m, Placement(SPECS)), m, "cpu", str(bare))
    assert "pip install" in caught.value.hint


def test_program_that_fails_shows_the_end_of_its_output() -> None:
    pytest.importorskip("jax")
    m = mesh("dgx-a100-80gb:1x8")
    with pytest.raises(BackendError, match="ZeroDivisionError"):
        compile_program("1 / 0\n", m, "cpu")


# ---- compilers -----------------------------------------------------------------------------------

PINS = {
    "x": (("x",), ("y",)), "layers.w_in": (("x",), ("y",)), "layers.w_out": (("y",), ("x",)),
    "layers.x.in": (("x",), ("y",)), "layers.h": (("x",), ("y",)),
}  # fmt: skip


def test_cpu_compiler_agrees_on_flops() -> None:
    pytest.importorskip("jax")
    result = price_annotations(mlp(), mesh("dgx-a100-80gb:1x8"), PINS)
    v = verify(result, "cpu")
    flops = next(r for r in v.rows if r.name.startswith("FLOPs"))
    assert flops.compiled == flops.predicted == FLOPS / DEVICES
    assert "jax" in v.compiled.versions
    shown = text(v)
    assert shown.startswith("8 chips, 8 devices, mesh x=2 × y=4\n")
    assert document(v)["ok"] is v.ok


def test_a_carry_goes_into_its_loop_as_planned() -> None:
    """Two dimensions to one: two exchanges as planned; left alone XLA gathers all of it."""
    pytest.importorskip("jax")
    m = mesh("tpu-v5e:2x4")
    by_batch = (("x", "y"), (), ())
    inside = dict.fromkeys(("layers.x.in", "layers.ln", "layers.middle"), by_batch)
    pins = {"x": ((), ("y",), ("x",)), **inside}
    result = price_annotations(decoder(16, positions=8, width=16), m, pins)
    place = placement(result)
    rest = {use: copy for use, copy in place.uses.items() if use[0] != "layers"}
    once = []
    for told in (place, replace(place, uses=rest)):
        hlo = compile_program(jax_program(result.model, m, told), m, "cpu").hlo
        once.append({
            (c.kind, c.axes) for c in read(parse(hlo), m.axes).collectives
            if c.op_name.endswith(("jvp()/sharding_constraint", "jvp()/while"))
        })  # fmt: skip
    assert once[0] == {("all-to-all", ("x",)), ("all-to-all", ("y",))}
    assert ("all-gather", ("y",)) in once[1]


def test_cpu_compiler_agrees_on_padding() -> None:
    """8194 rows over 8 devices: every device computes 1025."""
    pytest.importorskip("jax")
    eighths = (("x", "y"), ())
    pins = {
        "x": (("x",), ()), "layers.w_in": ((), ()), "layers.w_out": ((), ()),
        "layers.x.in": eighths, "layers.h": eighths, "layers.x": eighths,
    }  # fmt: skip
    model = replace(mlp(8194), uneven=True)
    v = verify(price_annotations(model, mesh("tpu-v4:2x2x2"), pins), "cpu")
    flops = next(r for r in v.rows if r.name.startswith("FLOPs"))
    assert flops.compiled == flops.predicted == FLOPS / BATCH * 1025, text(v)


@pytest.mark.compiler
@pytest.mark.parametrize("topology", ["tpu-v3:2x2", "tpu-v4:2x2x2", "tpu-v5e:2x4"])
def test_tpu_compiler_agrees(topology: str) -> None:
    """Batch large enough that the natural plan gathers weights and leaves the batch split."""
    pytest.importorskip("libtpu")
    result = price_annotations(mlp(batch=32768, width=4096), mesh(topology), PINS)
    v = verify(result)
    exact = [r for r in v.rows if r.name in ("arguments", "FLOPs per device")]
    assert len(exact) == 2
    assert all(r.error == pytest.approx(0, abs=0.001) for r in exact), text(v)
    judged = [r for r in v.collectives if r.threshold is not None]
    assert len(judged) == 4
    assert all(r.error == pytest.approx(0, abs=0.01) for r in judged), text(v)


@pytest.mark.compiler
def test_out_of_memory_is_an_answer() -> None:
    """A batch that no v5e device holds: the compiler says how much it needs."""
    pytest.importorskip("libtpu")
    result = price_annotations(mlp(batch=2**20, width=8192), mesh("tpu-v5e:2x4"), PINS)
    v = verify(result)
    assert v.compiled.status == "exhausted"
    assert v.compiled.needed_bytes is not None
    assert v.compiled.needed_bytes > v.limit_bytes
    assert v.ok is not result.fits
    assert "ran out of memory" in text(v)


@pytest.mark.compiler
def test_tpu_devices_lie_in_the_mesh_as_priced() -> None:
    """The device at every place of the program's mesh has the coordinates of device_order()."""
    pytest.importorskip("libtpu")
    m = mesh("tpu-v3:2x2")
    source = jax_program(mlp(), m, Placement(SPECS))
    physical = m.topology.coordinates()[m.device_order().reshape(-1)]
    check = (
        f"\n_step = compiled_step\n\ndef compiled_step(mesh):\n"
        f"    found = [(*d.coords[:2], d.core_on_chip) for d in mesh.devices.flat]\n"
        f"    expected = {[tuple(map(int, row)) for row in physical]}\n"
        f"    if found != expected:\n"
        f"        raise ValueError(f'devices lie as {{found}}')\n"
        f"    return _step(mesh)\n"
    )
    compiled = compile_program(source + check, m, "tpu")
    assert read(parse(compiled.hlo), m.axes).flops == FLOPS / DEVICES
