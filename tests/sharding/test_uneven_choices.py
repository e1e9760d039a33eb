"""Uneven splits: which are offered, what they cost, and where they are not."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
from small_models import odd_steps, steps

import meshes
from costmodels.pricing import kernel_seconds
from costmodels.program import Collective
from planner.graph import expr as ex
from planner.graph import layers, structural, windows
from planner.graph.builder import Builder
from planner.graph.core import Graph, Op
from planner.lowering.halo import halos
from planner.lowering.lower_op import lower_op
from planner.model import Model, Training
from planner.pins import PinError
from planner.planning import price_annotations
from planner.report.padding import padding_notes
from planner.sharding.choices import Choice, OpChoices
from planner.sharding.flow import build_flow
from planner.sharding.formulate import home_specs
from planner.sharding.halo import along
from planner.sharding.spec import Spec, divides

EIGHT = {"x": 8}
AXES = (("x", 8),)
WORDS, WIDTH, BATCH = 50257, 1600, 12


def choices(op: Op, sizes: tuple[tuple[str, int], ...] = AXES) -> dict[str, Choice]:
    return {c.describe(op.rule): c for c in OpChoices(op, sizes, uneven=True).choices}


def ops(graph: Graph) -> dict[str, Op]:
    return {op.name: op for op, _ in graph.walk()}


def language_model(rows: int = BATCH) -> Graph:
    b = Builder()
    x = b.input("x", (rows, WIDTH), ("B", "D"), "bf16")
    targets = b.input("targets", (rows,), ("B",), "i32")
    w = b.param("w", (WORDS, WIDTH), ("V", "D"))
    y = b.einsum("B D, V D -> B V", x, w, name="logits")
    return b.graph([layers.cross_entropy(b, y, targets)])


def test_a_device_computes_its_block_padding_included() -> None:
    """⌈50257 / 8⌉ = 6283 words and ⌈12 / 8⌉ = 2 rows."""
    graph = language_model()
    op = ops(graph)["logits"]
    tensors = graph.all_tensors()
    mesh = meshes.logical(meshes.resolve("tpu-v4:2x2x2"), EIGHT)
    words, rows = (choices(op)[f"{name}:x"] for name in "VB")
    kernel = lower_op(op, words, tensors, EIGHT)
    assert kernel.matmul is not None
    assert sorted(kernel.matmul) == [1, BATCH, WIDTH, 6283]
    assert sorted(lower_op(op, rows, tensors, EIGHT).matmul or ()) == [1, 2, WIDTH, WORDS]
    assert words.result(op.rule, 0, ["x"]).local_shape((BATCH, WORDS), EIGHT) == (BATCH, 6283)
    whole = lower_op(op, choices(op)["replicated"], tensors, EIGHT)
    ratio = kernel_seconds(mesh.chip, kernel) / kernel_seconds(mesh.chip, whole)
    assert ratio < 1 / 6  # the rest is what starting a kernel takes


def test_masks_are_work_of_sums_over_padding() -> None:
    """A comparison and a selection at each of 12 × 6283 points, and only there."""
    graph = language_model()
    op = next(o for o in ops(graph).values() if o.rule.combiner == "max")
    found = choices(op)
    each = ex.operations(op.attrs["exprs"][0])
    rows, words = (lower_op(op, found[f"{name}:x"], graph.all_tensors(), EIGHT) for name in "BV")
    assert rows.vector_flops == 2 * WORDS * max(1, each)
    assert words.vector_flops == BATCH * 6283 * (max(1, each) + 2)
    assert words.payload.attrs["sums"] == {"V": WORDS}


@pytest.mark.parametrize("name", steps())
def test_where_axes_divide_nothing_is_added(name: str) -> None:
    """All sizes of these models are powers of two: the search is as large as it was."""
    for op, _ in steps()[name]().walk():
        if all(f.size % 2 == 0 or f.size == 1 for f in op.rule.factors):
            assert OpChoices(op, AXES, uneven=True).choices == OpChoices(op, AXES).choices


def test_no_padding_inside_of_a_dimension() -> None:
    """25 heads of 64 are 1600 columns, of which 8 devices have 200 each: no whole heads."""
    b = Builder()
    x = b.param("x", (8, 25 * 64), ("B", "D"))
    y = structural.reshape(b, x, (8, 25, 64), ("B", "N", "H"), "split")
    twice = b.map("twice", [(y, ("B", "N", "H"))], ("B", "N", "H"), ex.mul(ex.c(2), ex.x(0)))
    found = ops(b.graph([twice]))
    assert "N:x" not in choices(found["split"])
    assert "N:x" in choices(found["twice"])


def test_what_wraps_around_has_equal_blocks() -> None:
    b = Builder()
    x = b.param("x", (7, 3), ("S", "D"))
    y = windows.shift(b, windows.shift(b, x, "S", 1, "open"), "S", 1, "ring", wrap=True)
    found = ops(b.graph([y]))
    axes = (("x", 2),)
    assert "S:x" in choices(found["open"], axes)
    assert "S:x" not in choices(found["ring"], axes)


def test_a_convolution_over_seven_rows() -> None:
    """7 rows over 2 devices: blocks of 4, the last row of the second is padding. 3 taps read one
    row of the neighbour; the padding counts as the border's zeros, as does what is outside."""
    b = Builder()
    x = b.input("x", (2, 7, 4), ("B", "H", "C"), "f32")
    y = windows.conv(b, x, b.param("w", (3, 4, 4), ("k", "I", "O")), name="conv")
    one = windows.conv(b, y, b.param("v", (1, 4, 4), ("k", "I", "O")), name="pointwise")
    graph = b.graph([one])
    sizes, axes = {"x": 2}, (("x", 2),)
    op = ops(graph)["conv"]
    split = choices(op, axes)["H:x"]
    (read,) = along(op, split.split, sizes, 0).reads
    assert (read.own, read.starts, read.length, read.beyond) == (4, (-1, 3), 6, True)
    assert (read.low, read.high) == (1, 1)
    (halo,) = halos(op, split, graph.all_tensors(), sizes)
    assert halo.result == (2, 6, 4)
    assert lower_op(op, split, graph.all_tensors(), sizes).matmul == (1, 2 * 4, 4, 3 * 4)
    op = ops(graph)["pointwise"]  # rows of padding make rows of padding: nothing to exchange
    assert halos(op, choices(op, axes)["H:x"], graph.all_tensors(), sizes) == ()


MODELS = odd_steps()


@pytest.mark.parametrize("name", MODELS)
def test_arguments_and_results_of_a_step_are_even(name: str) -> None:
    """JAX takes and gives arrays in equal shards; what lies between may be padded."""
    graph = MODELS[name]()
    flow = build_flow(graph, {}, uneven=True)
    given = {flow.home_of[n][0] for n in graph.inputs}
    padded = 0
    for home in flow.homes:
        fit = [s.fits(home.shape, EIGHT) for s in home_specs(home, EIGHT)]
        if home.id in given or home.tensor.endswith("@output"):
            assert all(fit), home.tensor
        padded += not all(fit)
    assert padded
    without = build_flow(graph, {})
    assert all(s.fits(h.shape, EIGHT) for h in without.homes for s in home_specs(h, EIGHT))


def test_a_table_stored_by_columns_is_used_by_words() -> None:
    """50257 words over 8 devices: the table is stored even, each device gets its words by an
    all-to-all of the padded table, and multiplies them only."""
    rows = 8192
    training = Training(rows, optimizer="sgd", params="bf16")
    mesh = meshes.logical(meshes.resolve("tpu-v4:2x2x2"), EIGHT)
    model = Model("words", language_model(rows), training, rows, uneven=True)
    result = price_annotations(model, mesh, {"w": ((), ("x",)), "logits": ((), ("x",))})
    assert result.specs["logits"] == Spec(((), ("x",)))
    assert result.specs["w"] == Spec(((), ("x",)))
    moves = [
        (i.tensor, i.bytes)
        for i, _ in result.one_program.instructions()
        if isinstance(i, Collective) and i.kind == "all-to-all"
    ]
    padded = 8 * 6283 * (WIDTH // 8) * 2
    assert moves == [("w.cast", padded), ("w.cast.grad", padded)]
    even = price_annotations(replace(model, uneven=False), mesh, {"w": ((), ("x",))})
    assert even.specs["logits"].fits((rows, WORDS), EIGHT)
    assert "V 50257" in padding_notes(even)[0]
    assert padding_notes(result) == ["padded: V 50257 over 8 (+0.0%)"]
    with pytest.raises(PinError, match="does not divide"):
        price_annotations(model, mesh, {"w": (("x",), ())})  # an argument


def test_more_shards_never_mean_less_padding() -> None:
    """So choices and specs can be grown axis by axis."""
    for size in range(1, 200):
        for some, more in ((2, 2), (2, 4), (3, 2), (4, 4), (8, 2), (5, 3)):
            padded = [-(-size // n) * n for n in (some, some * more)]
            assert padded[0] <= padded[1]
            assert divides(size, some, True) or not divides(size, some * more, True)
            assert divides(size, prod((some, more))) <= divides(size, prod((some, more)), True)
