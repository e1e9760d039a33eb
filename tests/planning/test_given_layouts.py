"""Layouts that are given rather than found: read as they lie, gradients added up at home."""

from __future__ import annotations

import pytest

import meshes
from costmodels.compute import stream_seconds
from costmodels.summary import collectives
from planner.annotations import axes_by_name
from planner.modelfile import load_model
from planner.pins import Meaning
from planner.planning import price_annotations
from planner.request import Request, plan
from planner.sharding.formulate import Unsatisfiable
from planner.source import find

DATA, MODEL = ("data",), ("model",)
TEXT = """
training: {batch: B, optimizer: adam, accumulation_steps: 4, reduce_once: true}
graph:
  inputs: {x: "f32[B, D]", y: "f32[B, D]"}
  params: {w_in: "[D, F]", w_out: "[F, D]"}
  ops:
    - h = einsum("B D, D F -> B F", x, w_in)
    - z = einsum("B F, F D -> B D", relu(h), w_out)
    - loss = mean(square(z - y))
dims: {B: 32, D: 256, F: 1024}
"""
# Megatron's feed-forward layer: columns, then rows, replicated over data with its optimizer.
LAYOUT = {
    "x": (DATA, ()), "h": (DATA, MODEL), "z": (DATA, ()), "w_in": ((), MODEL), "w_out": (MODEL, ()),
    "w_in.m": ((), MODEL), "w_in.v": ((), MODEL), "w_out.m": (MODEL, ()), "w_out.v": (MODEL, ()),
}  # fmt: skip


def mesh(data: int, model: int) -> meshes.LogicalMesh:
    topology = meshes.resolve(f"dgx-a100-80gb:1x{data * model}")
    return meshes.logical(topology, {"data": data, "model": model})


def test_gradients_are_added_up_before_they_are_reduced() -> None:
    given = price_annotations(load_model(TEXT, "mlp"), mesh(4, 2), LAYOUT, as_laid=LAYOUT)
    over_data = [
        (row.kind, row.bytes, row.count)
        for row in collectives(given.program, given.mesh)
        if row.axes == DATA and row.bytes > 4
    ]
    half_of_a_weight = 256 * 1024 // 2 * 4
    assert over_data == [("all-reduce", half_of_a_weight, 1)] * 2
    over_model = [r for r in collectives(given.program, given.mesh) if r.axes == MODEL]
    assert [(r.kind, r.count, r.tensor) for r in over_model] == [("all-reduce", 4, "z")]


def test_unasked_gradients_are_reduced_in_every_part() -> None:
    """One XLA program reduces what a loop adds up in every iteration: here into sums that lie
    scattered, which are gathered for the update."""
    text = TEXT.replace(", reduce_once: true", "")
    given = price_annotations(load_model(text, "mlp"), mesh(4, 2), LAYOUT, as_laid=LAYOUT)
    counts = {
        (row.kind, row.count)
        for row in collectives(given.program, given.mesh)
        if row.axes == DATA and row.bytes > 4
    }
    assert counts == {("reduce-scatter", 4), ("all-gather", 1)}
    assert not any(spec.partial for spec in given.plan.homes.values())


def test_operands_are_read_as_they_lie() -> None:
    """Free to choose, products read other slices; as laid, only sums cross the network."""
    model, on = load_model(TEXT, "mlp"), mesh(4, 2)
    free = price_annotations(model, on, LAYOUT)
    given = price_annotations(model, on, LAYOUT, as_laid=LAYOUT)
    assert {r.kind for r in collectives(given.program, on)} == {"all-reduce"}
    assert given.plan.proof.objective_s >= free.plan.proof.objective_s


def test_the_pin_of_a_cast_copy_says_nothing_of_its_gradient() -> None:
    """A weight stored in shards and read whole: gradients are scattered home, not reduced whole."""
    text = """
training: {batch: 32, optimizer: adam, compute: bf16}
architecture: {kind: encoder, layers: 2, d_model: 1024, heads: 8, sequence: 128, vocab: 512}
"""
    model, on = load_model(text, "stack"), mesh(8, 1)
    weights = {"layers.w_in": ((), DATA), "layers.w_out": ((), DATA)}
    copies = {"layers.w_in.cast": ((), ()), "layers.w_out.cast": ((), ())}
    batch = {"layers.x": (DATA, (), ()), "layers.in": (DATA, (), ())}
    given = price_annotations(model, on, {**weights, **copies, **batch})
    moved = {(r.kind, r.tensor) for r in collectives(given.program, on) if r.bytes > 1e6}
    for weight in weights:
        assert ("all-gather", f"{weight}.cast") in moved
        assert ("reduce-scatter", f"{weight}.cast.grad") in moved


def test_an_axis_of_size_one_splits_nothing() -> None:
    model = load_model(TEXT, "mlp")
    alone = price_annotations(model, mesh(1, 1), LAYOUT, as_laid=LAYOUT)
    assert alone.timing.exposed_communication_s == 0


def test_products_that_add_up_gradients_save_the_passes_that_do() -> None:
    """A pass over each weight's gradient per part: two arrays read, one written, all f32."""
    text = TEXT.replace("training: {", "training: {fused_accumulation: true, ")
    on = mesh(1, 1)
    apart, fused = (price_annotations(load_model(t, "mlp"), on, LAYOUT) for t in (TEXT, text))
    a_pass = stream_seconds(on.chip, 3 * 256 * 1024 * 4, dtype="f32")
    saved = apart.timing.step_time_s - fused.timing.step_time_s
    assert saved == pytest.approx(4 * 2 * a_pass, rel=1e-6)
    assert fused.memory.peak_bytes == apart.memory.peak_bytes


def test_a_layout_that_no_op_can_read() -> None:
    """One axis would split two dimensions of the difference z - y."""
    impossible = {"z": (DATA, ()), "y": ((), DATA)}
    with pytest.raises(Unsatisfiable, match="cannot read its operands"):
        price_annotations(load_model(TEXT, "mlp"), mesh(8, 1), impossible, as_laid=impossible)


@pytest.mark.parametrize("name", ["lamda-137b", "bert-480b", "gshard-m4", "unet-2d"])
def test_annotations_of_a_plan_stand_for_that_plan(name: str) -> None:
    """Read as what a program asks for, they bind gradients too, which can only be slower."""
    planned = plan(Request(find(name))).result
    annotation = axes_by_name(planned)
    model, on = planned.model, planned.mesh
    again = price_annotations(model, on, annotation, meaning=Meaning.PLAN)
    assert again.timing.step_time_s == pytest.approx(planned.timing.step_time_s, rel=1e-3)
    assert axes_by_name(again) == annotation
    bound = price_annotations(model, on, annotation)
    assert bound.timing.step_time_s >= again.timing.step_time_s * (1 - 1e-3)
    if name == "lamda-137b":  # gradients of layer inputs lie elsewhere in the plan
        assert bound.timing.step_time_s > again.timing.step_time_s * 1.02
