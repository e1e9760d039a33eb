"""What TPUs' compiler computes inside of products: which passes, at what cost, in what memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
from given_choices import chosen
from small_models import decoder

import meshes
from costmodels.compute import matmul_seconds
from costmodels.memory import read_memory
from costmodels.pricing import kernel_seconds, many_kernel_seconds
from costmodels.program import Compute, Kernel, Program
from meshes import LogicalMesh
from planner.graph.core import Graph, Op
from planner.graph.derive import training_step
from planner.lowering.inside import OPERAND, RESULT, inside_products
from planner.model import Model
from planner.pins import Meaning
from planner.planning import Options, Planning, price_annotations
from planner.source import find
from planner.verify import verify

TPU = meshes.logical(meshes.resolve("tpu-v4:2x2x2"), {"x": 8})
GPU = meshes.logical(meshes.resolve("dgx-a100-80gb:1x8"), {"x": 8})


BY_BATCH = {"ids": (("x",), ()), "layers.x.in": (("x",), (), ())}
NAME = "layers.attn"


def large() -> Model:
    return decoder(8, positions=512, width=64, hidden=64, heads=8, head=8, remat="full")


def marked(graph: Graph) -> dict[str, Op]:
    return {op.name: op for op, _ in inside_products(graph).walk()}


def inside(ops: dict[str, Op], kind: str) -> set[str]:
    return {name for name, op in ops.items() if op.attrs.get("inside") == kind}


def test_attention_stores_its_scores_and_the_gradient_of_its_probabilities() -> None:
    """As in the compiled program: the maximum is made with the scores, the sum by a pass of its
    own, probabilities and the gradient of the scores inside of the products that read them."""
    ops = marked(training_step(decoder(remat="full"), lean=True))
    assert inside(ops, OPERAND) == {
        f"{NAME}.probs", f"{NAME}.probs~", f"{NAME}.scores.grad",
    }  # fmt: skip
    assert inside(ops, RESULT) == {f"{NAME}.probs.max", f"{NAME}.probs.max~", f"{NAME}.probs.dot"}
    # Slots: what is made with a result, and operands that are computed inside.
    inner = {n: op.attrs["inner"] for n, op in ops.items() if "inner" in op.attrs}
    assert {slot for work in inner.values() for slot, _, _ in work} == {-1, 0, 1}
    assert inner[f"{NAME}.scores"][0][2] == 0  # nothing of its size is read besides
    assert inner["layers.q.grad"][0][2] == inner["layers.k.grad"][0][2] == 2  # bf16 scores


def test_the_block_by_block_softmax_stores_scores_alone() -> None:
    model = find("llama3-8b", ["architecture.attention_blocks=4"]).load()
    ops = marked(training_step(model, lean=True))
    kept = {n for n, op in ops.items() if n.endswith((".probs", ".scores.grad", ".top.new"))}
    assert kept <= inside(ops, OPERAND) | inside(ops, RESULT)
    assert "layers.attn.ring.part" not in inside(ops, RESULT)  # it depends on the new maximum


def test_what_is_kept_for_the_backward_pass_is_stored() -> None:
    ops = marked(training_step(decoder(remat="none"), lean=True))
    assert "layers.attention.probs" not in inside(ops, OPERAND)


def test_products_by_weights_are_left_alone() -> None:
    ops = marked(training_step(decoder(remat="full"), lean=True))
    assert not {"layers.act", "layers.act~", "layers.h.grad"} & inside(ops, OPERAND)
    assert not any("inner" in ops[name].attrs for name in ("layers.y", "layers.h", "logits"))


def planning(mesh: LogicalMesh) -> Planning:
    return Planning(large(), mesh, Options(), BY_BATCH, None, Meaning.PROGRAM)


def passes(program: Program) -> dict[str, tuple[int, Kernel]]:
    """Name of a kernel → what it makes, and the kernel."""
    steps = (i for i, _ in program.instructions())
    return {i.kernel.name: (i.outs[0], i.kernel) for i in steps if isinstance(i, Compute)}


def test_what_only_products_read_takes_neither_time_nor_memory() -> None:
    program = planning(TPU).completed().program
    assert isinstance(program, Program)
    buffer, kernel = passes(program)[f"{NAME}.scores.grad"]
    assert kernel_seconds(TPU.chip, kernel) == 0
    assert buffer in program.remade
    # Probabilities, their gradient and that of the scores, or scores and the gradient alone.
    as_passes = read_memory(replace(program, remade={})).peak_bytes
    saved = as_passes - read_memory(program).peak_bytes
    assert saved == pytest.approx(program.buffers[buffer].bytes, rel=0.1)


def test_what_is_moved_before_a_product_reads_it_is_stored() -> None:
    how = planning(TPU)
    result = how.completed()
    moved = how.lowered(chosen(result, **{f"{NAME}.probs": {"N": ("x",)}}).plan).program
    assert passes(moved)[f"{NAME}.probs"][0] not in moved.remade
    as_it_lies = how.lowered(result.plan).program
    assert passes(as_it_lies)[f"{NAME}.probs"][0] in as_it_lies.remade


def test_gpus_run_every_pass() -> None:
    how = planning(GPU)
    kernels = [kernel for _, kernel in passes(how.lowered(how.completed().plan).program).values()]
    assert next(k for k in kernels if k.name == f"{NAME}.probs").bytes > 0
    assert not any(k.vector_flops for k in kernels if k.matmul)


def test_work_inside_of_a_product_adds_its_time() -> None:
    sizes = (32, 1024, 1024, 128)
    plain = Kernel("k", "map", "bf16", 0.0, 0.0, sizes)
    busy = replace(plain, vector_flops=4.3e9)
    reading = replace(plain, fused_bytes=1e9)
    chip = TPU.chip
    alone, worked, read = (kernel_seconds(chip, k) for k in (plain, busy, reading))
    assert alone == matmul_seconds(chip, *sizes)
    assert worked - alone == pytest.approx(4.3e9 / chip.vector_flops)
    assert read > alone
    together = many_kernel_seconds(chip, [plain, busy, reading])
    assert together.tolist() == [alone, worked, read]


@pytest.mark.compiler
def test_long_sequences_take_what_the_compiler_says() -> None:
    """Two layers of Llama 3 8B, 8192 positions on each chip: 40 % too slow before."""
    sizes = ["architecture.layers=2", "training.batch=8", "training.accumulation_steps=1"]
    model = find("llama3-8b", sizes).load()
    batch = {"tokens": (("x",), ()), "logits": (("x",), (), ())}
    found = verify(price_annotations(model, TPU, batch), "tpu")
    rows = {row.name: row for row in found.rows}
    assert abs(rows["compute time"].error or 1) < 0.15
    assert abs(rows["peak"].error or 1) < 0.15
