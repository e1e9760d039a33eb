"""Fuses chains of elementwise ops into one op, as XLA does; the intermediates disappear.

A producer without reductions, read by exactly one op of the same phase, is substituted into
that op's expression. Contractions keep their operands: a fused operand would be recomputed
for every output tile.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from planner.graph import expr as ex
from planner.graph.builder import contraction_sizes, linear_groups
from planner.graph.core import Dims, Factor, Graph, Loop, Node, Op, Rule, Tensor

MAX_OPERANDS = 10  # a fused op reads at most this many arrays
MAX_SIZE = 400  # and its expression, a tree that doubles with every reuse, has this many nodes


def fuse_graph(graph: Graph, keep: Collection[str] = ()) -> Graph:
    """The graph with its own and its loop bodies' elementwise chains fused, but for `keep`."""
    nodes = [
        replace(n, body=_fuse_body(n, keep)) if isinstance(n, Loop) else n for n in graph.nodes
    ]
    whole = {*graph.outputs, *keep}
    return _with_nodes(graph, fuse_nodes(nodes, graph.tensors, keep=whole))


def _fuse_body(loop: Loop, keep: Collection[str]) -> Graph:
    outputs = {k.exit for k in loop.carries} | {s.inner for s in loop.writes}
    return fuse_graph(replace(loop.body, outputs=tuple(sorted(outputs))), keep)


def _with_nodes(graph: Graph, nodes: Sequence[Node]) -> Graph:
    gone = {o for n in graph.nodes for o in n.outs} - {o for n in nodes for o in n.outs}
    tensors = {k: t for k, t in graph.tensors.items() if k not in gone}
    return replace(graph, nodes=tuple(nodes), tensors=tensors)


def fuse_nodes(
    nodes: Iterable[Node], tensors: Mapping[str, Tensor], keep: Collection[str]
) -> tuple[Node, ...]:
    """`nodes` of one scope with single-use elementwise producers merged into their readers."""
    done: list[Node] = []
    place: dict[str, int] = {}
    readers = Counter(i for n in nodes for i in set(n.ins))
    for node in nodes:
        if isinstance(node, Op) and _may_absorb(node):
            node = _absorb(node, done, place, readers, keep)
        place.update({o: len(done) for o in node.outs})
        done.append(node)
    gone = _unread(done, readers)
    return tuple(n for i, n in enumerate(done) if i not in gone)


def _unread(done: Sequence[Node], readers: Counter[str]) -> set[int]:
    """Positions of producers that were absorbed (their only reader reads them no more)."""
    return {
        i
        for i, n in enumerate(done)
        if isinstance(n, Op) and all(readers.get(o) == -1 for o in n.outs)
    }


def _may_absorb(op: Op) -> bool:
    special = op.attrs.get("vjp") or op.attrs.get("onehot")
    return op.kind == "map" and contraction_sizes(op) is None and not special


def _absorb(
    op: Op, done: list[Node], place: dict[str, int], readers: Counter[str], keep: Collection[str]
) -> Op:
    changed = True
    while changed:
        changed = False
        for name in dict.fromkeys(op.ins):
            at = place.get(name)
            producer = done[at] if at is not None else None
            if not isinstance(producer, Op) or readers[name] != 1 or name in keep:
                continue
            merged = _merge(producer, op) if _fusible(producer, op) else None
            if merged is not None:
                readers[name] = -1
                readers.subtract(set(producer.ins) & set(op.ins))  # two readers became one
                op, changed = merged, True
                break
    return op


def _fusible(producer: Op, reader: Op) -> bool:
    return (
        producer.kind == "map"
        and producer.phase == reader.phase
        and len(producer.outs) == 1
        and not any(f.kind == "reduce" for f in producer.rule.factors)
        and not any(producer.attrs.get(k) for k in ("vjp", "onehot", "stop", "epilogue"))
    )


def _merge(producer: Op, reader: Op) -> Op | None:
    """`reader` computing `producer`'s expression itself; None if it would read too much."""
    name = producer.outs[0]
    views = {dims for i, dims in zip(reader.ins, reader.rule.ins, strict=True) if i == name}
    if len(views) != 1:
        return None  # read under two labelings (x·xᵀ): not one elementwise chain
    view = next(iter(views))
    own = producer.rule
    to_reader = {own.outs[0][d][0]: dim[0] for d, dim in enumerate(view)}
    if any(i not in to_reader for dims in own.ins for dim in dims for i in dim):
        return None
    kept = [(t, d) for t, d in zip(reader.ins, reader.rule.ins, strict=True) if t != name]
    added: list[tuple[str, Dims]] = [
        (t, tuple((to_reader[dim[0]],) for dim in dims))
        for t, dims in zip(producer.ins, own.ins, strict=True)
    ]
    operands = list(dict.fromkeys(kept + added))
    if len(operands) > MAX_OPERANDS:
        return None
    number = {operand: ex.x(i) for i, operand in enumerate(operands)}
    rename = {own.factors[a].name: reader.rule.factors[r].name for a, r in to_reader.items()}
    inner = ex.substitute(
        producer.attrs["exprs"][0], {i: number[a] for i, a in enumerate(added)}, rename
    )
    slots = {
        i: inner if t == name else number[(t, d)]
        for i, (t, d) in enumerate(zip(reader.ins, reader.rule.ins, strict=True))
    }
    exprs = tuple(ex.substitute(e, slots) for e in reader.attrs["exprs"])
    if sum(map(ex.size, exprs)) > MAX_SIZE:
        return None
    return _rebuilt(reader, operands, exprs)


def _rebuilt(
    reader: Op, operands: Sequence[tuple[str, Dims]], exprs: tuple[ex.Expr, ...]
) -> Op:
    rule = reader.rule
    factors: tuple[Factor, ...] = rule.factors
    linear = linear_groups(exprs, len(operands), rule.combiner)
    new = Rule(factors, tuple(d for _, d in operands), rule.outs, linear, rule.combiner)
    attrs = {**reader.attrs, "exprs": exprs}
    return replace(reader, ins=tuple(t for t, _ in operands), rule=new, attrs=attrs)
