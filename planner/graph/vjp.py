"""Gradients of single ops: for an op and the cotangents of its results, emit backward ops.

One function per op kind, registered in VJPS; each returns {operand position: cotangent name}.
The rule of a gradient op follows from the forward rule because it is built by the same
builder. Nothing here walks a graph (that is `derive.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from planner.graph import expr as ex
from planner.graph import structural, windows
from planner.graph.builder import Builder, Operand, contraction_sizes
from planner.graph.core import Op

Cotangents = Mapping[str, str]  # forward tensor → tensor holding its cotangent
Wanted = Sequence[int]  # operand positions whose cotangents are needed
Vjp = Callable[[Builder, Op, Cotangents, Wanted], dict[int, str]]


def labels_of(op: Op, dims: Sequence[Sequence[int]]) -> tuple[str, ...]:
    """Factor names of an operand or result whose dimensions have one factor each."""
    return tuple(op.rule.factors[d[0]].name for d in dims)


def map_vjp(b: Builder, op: Op, cotangents: Cotangents, wanted: Wanted) -> dict[int, str]:
    if op.attrs.get("stop"):
        # A stabiliser (the maximum under an exp): results do not depend on it mathematically.
        # Sums marked "stop" are handled by their consumer's own rule (softmax).
        return {}
    if op.attrs.get("vjp") == "softmax":
        return _softmax_vjp(b, op, cotangents[op.outs[0]])
    return {j: _map_operand(b, op, cotangents, j) for j in wanted if _depends(op, j)}


def _depends(op: Op, j: int) -> bool:
    return any(ex.derivative(e, j) != ex.c(0) for e in op.attrs["exprs"])


def _map_operand(b: Builder, op: Op, cotangents: Cotangents, j: int) -> str:
    """Σ over results of g·∂f/∂x_j, summed over the factors that operand j lacks."""
    operands: list[Operand] = []
    value: ex.Expr = ex.c(0)
    for k, out in enumerate(op.outs):
        if out not in cotangents:
            continue
        partial = ex.derivative(op.attrs["exprs"][k], j)
        if partial == ex.c(0):
            continue
        if op.rule.combiner == "max":
            partial = ex.mul(_is_top(op, operands, k), partial)
        operands.append((cotangents[out], labels_of(op, op.rule.outs[k])))
        value = ex.add(value, ex.mul(ex.x(len(op.ins) + len(operands) - 1), partial))
    full = [(t, labels_of(op, d)) for t, d in zip(op.ins, op.rule.ins, strict=True)] + operands
    used = sorted(ex.arguments(value))
    compact = {old: ex.x(new) for new, old in enumerate(used)}
    attrs = {"picks": op.attrs["picks"]} if "picks" in op.attrs else {}
    if op.attrs.get("onehot") == "take":
        attrs = {"onehot": "scatter", "along": op.attrs["along"]}
    if op.attrs.get("onehot") == "choose":
        attrs = {"onehot": "place", "along": op.attrs["along"]}
    target = b.lookup(op.ins[j])
    if value == ex.x(0) or (len(used) == 1 and ex.substitute(value, compact) == ex.x(0)):
        source, labels = full[used[0]]
        if labels == labels_of(op, op.rule.ins[j]) and b.lookup(source).dtype == target.dtype:
            return source  # the cotangent passes unchanged
    return b.map(
        f"{target.name}.grad", [full[i] for i in used], labels_of(op, op.rule.ins[j]),
        ex.substitute(value, compact), dtype=target.dtype, attrs=attrs,
        sizes={f.name: f.size for f in op.rule.factors
               if f.name in labels_of(op, op.rule.ins[j]) or f.name in ex.index_factors(value)},
    )  # fmt: skip


def _is_top(op: Op, operands: list[Operand], k: int) -> ex.Expr:
    """1 where the point attains the maximum, with the forward result as an extra operand."""
    operands.append((op.outs[k], labels_of(op, op.rule.outs[k])))
    return ex.call("eq", op.attrs["exprs"][k], ex.x(len(op.ins) + len(operands) - 1))


def _softmax_vjp(b: Builder, op: Op, g: str) -> dict[int, str]:
    """dx = p·(g − Σ p·g): the well-known form that needs only the result."""
    labels = labels_of(op, op.rule.outs[0])
    lead = tuple(label for label in labels if label != op.attrs["over"])
    p = op.outs[0]
    inner = b.map(
        f"{p}.dot", [(p, labels), (g, labels)], lead, ex.mul(ex.x(0), ex.x(1)), dtype="f32"
    )
    value = ex.mul(ex.x(0), ex.sub(ex.x(1), ex.x(2)))
    name = f"{op.ins[0]}.grad"
    dtype = b.lookup(op.ins[0]).dtype
    return {
        0: b.map(name, [(p, labels), (g, labels), (inner, lead)], labels, value, dtype=dtype)
    }


VJPS: dict[str, Vjp] = {"map": map_vjp, **structural.VJPS, **windows.VJPS}


def add_up(b: Builder, name: str, parts: Sequence[str]) -> str:
    """The sum of several cotangents of one tensor.

    Results of products are added first, in an op of their own: it costs little, because
    compilers add into the product's output, and its partial sums need only one reduction.
    """
    made = {out: node for node in b.nodes if isinstance(node, Op) for out in node.outs}
    products = [p for p in parts if p in made and contraction_sizes(made[p]) is not None]
    if len(products) > 1:
        others = [p for p in parts if p not in products]
        parts = [_sum(b, name, products, {"epilogue": True}), *others]
    return parts[0] if len(parts) == 1 else _sum(b, name, parts, {})


def _sum(b: Builder, name: str, parts: Sequence[str], attrs: Mapping[str, bool]) -> str:
    value = ex.x(0)
    for i in range(1, len(parts)):
        value = ex.add(value, ex.x(i))
    tensor = b.lookup(parts[0])
    labels = tensor.dims
    return b.map(
        name, [(p, labels) for p in parts], labels, value, dtype=tensor.dtype, attrs=attrs
    )
