"""Lowers one op under one choice to its local kernel: the piece that the ILP prices and the
Program contains."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from costmodels.program import ITEM_BYTES, Kernel
from planner.graph import expr as ex
from planner.graph.builder import contraction_sizes, volume
from planner.graph.core import FLOATS, Dims, Op, Rule, Tensor
from planner.lowering.halo import local_op
from planner.lowering.slices import by_slices, moved_copies
from planner.sharding.choices import Choice
from planner.sharding.spec import Sizes


def lower_op(op: Op, choice: Choice, tensors: Mapping[str, Tensor], sizes: Sizes) -> Kernel:
    """The kernel that one device runs; `offsets` names the axes that split each factor."""
    local = local_op(op, choice, sizes)
    offsets = {
        f.name: axes for f, axes in zip(op.rule.factors, choice.split, strict=True) if axes
    }
    product = None if op.attrs.get("picks") else contraction_sizes(local)
    dtype = _narrowest(op, tensors) if product is None else tensors[op.ins[0]].dtype
    copies = moved_copies(op) if by_slices(op, choice, local) else (0, 0)
    moved, work = _moved_bytes(local, tensors), _vector_flops(local)
    beside, more = _inner(local)
    if op.attrs.get("inside"):
        moved = work = 0.0
    elif product is None:
        moved, more = moved + more, 0.0
    return Kernel(
        op.name, op.kind, dtype, moved, work + beside, product, local, offsets, copies, more
    )  # fmt: skip


def _inner(op: Op) -> tuple[float, float]:
    """Operations and bytes of what is computed inside of an op (see planner.lowering.inside)."""
    operations = moved = 0.0
    for slot, each, of_each in op.attrs.get("inner", ()):
        dims = op.rule.outs[0] if slot < 0 else op.rule.ins[slot]
        elements = local_elements(op.rule, dims)
        operations, moved = operations + each * elements, moved + of_each * elements
    return operations, moved


def _narrowest(op: Op, tensors: Mapping[str, Tensor]) -> str:
    """The type that sets the pace of a pass: chips widen narrow numbers to compute with them."""
    floats = (d for d in (tensors[t].dtype for t in (*op.ins, *op.outs)) if d in FLOATS)
    return min(floats, key=lambda d: ITEM_BYTES[d], default="f32")


def local_elements(rule: Rule, dims: Dims) -> int:
    return prod(rule.factors[f].size for d in dims for f in d)


def _moved_bytes(op: Op, tensors: Mapping[str, Tensor]) -> float:
    """Bytes through device memory: every operand read and every result written once."""
    rule = op.rule
    if op.kind == "reshape" or op.attrs.get("in_products"):
        return 0.0  # another view; done by the product that makes an operand
    if op.kind == "shift" and set(op.attrs["padding"]) == {(0, 0)}:
        return 0.0  # what a shard reads has moved already
    reads = [
        local_elements(rule, d) * ITEM_BYTES[tensors[t].dtype]
        for t, d in zip(op.ins, rule.ins, strict=True)
    ]
    writes = [
        local_elements(rule, d) * ITEM_BYTES[tensors[t].dtype]
        for t, d in zip(op.outs, rule.outs, strict=True)
    ]
    if op.attrs.get("picks"):
        return _picked_bytes(op, tensors)
    if op.attrs.get("onehot") == "take":
        return float(reads[1] + 2 * writes[0])  # only the rows looked up are read
    if op.attrs.get("onehot") == "put":
        return float(2 * reads[1] + reads[2])  # in place: only the rows that are new
    if op.attrs.get("onehot") == "choose":
        return float(3 * writes[0] + reads[1])  # of the two rounds at work, one is written
    if op.attrs.get("onehot") == "add":
        return float(2 * (sum(reads[1:]) + 2 * _added_bytes(op, tensors)))  # in place, to both
    if op.kind == "put":
        return float(2 * reads[1])  # in place
    if op.kind == "pop":
        return float(3 * writes[0])  # read, written, and zeros are left
    if op.attrs.get("epilogue"):
        return float(sum(reads[1:]))  # products add the others' results into their own
    return float(sum(reads) + sum(writes))


def _added_bytes(op: Op, tensors: Mapping[str, Tensor]) -> int:
    """The part of a sum that something is added to."""
    along = next(i for i, f in enumerate(op.rule.factors) if f.name == op.attrs["along"])
    changed = tuple(d for d in op.rule.outs[0] if d != (along,))
    return local_elements(op.rule, changed) * ITEM_BYTES[tensors[op.outs[0]].dtype]


def _picked_bytes(op: Op, tensors: Mapping[str, Tensor]) -> float:
    """Rows come and go; the mask that says which is a short list of places."""
    rule = op.rule
    moved = 0
    for tensor, dims in zip((*op.ins, *op.outs), (*rule.ins, *rule.outs), strict=True):
        names = {rule.factors[f].name for d in dims for f in d}
        if not names.issuperset(op.attrs["picks"]):
            moved += local_elements(rule, dims) * ITEM_BYTES[tensors[tensor].dtype]
    return float(moved)


def _vector_flops(op: Op) -> float:
    """Elementwise operations over the points that the op visits."""
    if op.attrs.get("onehot") or op.attrs.get("in_products"):
        return 0.0  # a lookup or a scatter visits only the rows that ids name; see _moved_bytes
    exprs = op.attrs.get("exprs")
    if exprs is None or contraction_sizes(op) is not None:
        return 0.0
    # Masking what lies beyond an uneven factor: a comparison and a selection at every point.
    masks = 2 * len(op.attrs.get("sums", ()))
    return float(volume(op.rule) * sum(max(1, ex.operations(e)) + masks for e in exprs))
