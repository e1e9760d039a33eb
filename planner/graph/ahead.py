"""Casts of parameters that TPUs' compiler makes once, before loops.

What loops read of a parameter only to narrow it is narrowed as a whole before the first of them,
and held until the last is done; parts of the batch then read, and gather, what is narrow. Seen with
libtpu 0.0.52 in every zoo model, programs with and without parts of the batch.

Only how a step runs changes, not what it computes. A cast inside of a loop remains where a program
names its result; it makes nothing (see planner.lowering.inside). A cast that parts of the batch
have in common is moved out of their loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace

from costmodels.program import ITEM_BYTES
from planner.graph import expr as ex
from planner.graph.builder import distinct, is_cast
from planner.graph.core import Factor, Graph, Loop, Node, Op, Rule, Tensor

AHEAD = "ahead"  # attribute: which of these an op is
WHOLE = "whole"  # the cast of a whole parameter
SLICE = "slice"  # in a loop: what is left of the cast of one slice
NARROWED = ".narrow"  # behind a parameter: all of it, narrowed


def casts_ahead(graph: Graph) -> Graph:
    """The same step, with casts of parameters before loops."""
    tensors = graph.all_tensors()
    for parameter in graph.parameters():
        names = {parameter.name, *_pieces(graph.nodes, parameter.name)}
        inside = [n for loop in graph.nodes if isinstance(loop, Loop) for n in _nodes(loop)]
        casts = [n for n in inside if isinstance(n, Op) and names.intersection(n.ins)]
        dtypes = {tensors[op.outs[0]].dtype for op in casts}
        carried = any(k.init in names for n in inside if isinstance(n, Loop) for k in n.carries)
        if carried or len(dtypes) != 1 or not all(narrows(op, tensors) for op in casts):
            continue
        if all(parameter.name not in op.ins for op in casts):
            graph = _narrowed(graph, parameter, dtypes.pop(), names - {parameter.name})
        elif len(casts) == 1:
            graph = _moved_out(graph, parameter.name, casts[0])
    return graph


def narrowed_of(graph: Graph) -> dict[str, str]:
    """All of a parameter, narrowed → the parameter."""
    casts = (n for n in graph.nodes if isinstance(n, Op) and n.attrs.get(AHEAD) == WHOLE)
    return {op.outs[0]: op.ins[0] for op in casts}


def _nodes(loop: Loop) -> Iterator[Node]:
    """A loop and all that is in it."""
    yield loop
    for node in loop.body.nodes:
        yield from _nodes(node) if isinstance(node, Loop) else (node,)


def _pieces(nodes: Sequence[Node], name: str) -> Iterator[str]:
    """What loops read of a tensor, slice by slice."""
    for loop in (node for node in nodes if isinstance(node, Loop)):
        for inner in [s.inner for s in loop.reads if s.outer == name]:
            yield inner
            yield from _pieces(loop.body.nodes, inner)
        if name in loop.shared:
            yield from _pieces(loop.body.nodes, name)


def narrows(op: Op, tensors: Mapping[str, Tensor]) -> bool:
    """Whether an op only narrows what it reads."""
    return is_cast(op) and (
        ITEM_BYTES[tensors[op.outs[0]].dtype] < ITEM_BYTES[tensors[op.ins[0]].dtype]
    )


def _narrowed(graph: Graph, parameter: Tensor, dtype: str, pieces: Set[str]) -> Graph:
    """With one cast of all layers, of which loops read slices."""
    whole = replace(parameter, name=parameter.name + NARROWED, dtype=dtype, role="copy")
    nodes = [_reading(n, parameter.name, whole, pieces) for n in graph.nodes]
    first = next(i for i, n in enumerate(nodes) if isinstance(n, Loop) and whole.name in n.ins)
    nodes.insert(first, _cast(parameter, whole))
    return replace(graph, tensors={**graph.tensors, whole.name: whole}, nodes=tuple(nodes))


def _cast(source: Tensor, target: Tensor) -> Op:
    both = zip(distinct(source.dims), source.shape, strict=True)
    factors = tuple(Factor(name, size) for name, size in both)
    dims = tuple((i,) for i in range(len(factors)))
    attrs = {"exprs": (ex.x(0),), AHEAD: WHOLE}
    return Op(
        target.name, "map", (source.name,), (target.name,), Rule(factors, (dims,), (dims,)), attrs
    )


def _reading(node: Node, name: str, whole: Tensor, pieces: Set[str]) -> Node:
    """A loop that reads `whole` instead of `name`, and what is left of casts in it."""
    if isinstance(node, Op):
        left = {**node.attrs, AHEAD: SLICE}
        return node if pieces.isdisjoint(node.ins) else replace(node, attrs=left)
    tensors = {
        n: replace(t, dtype=whole.dtype) if n in pieces else t
        for n, t in node.body.tensors.items()
    }
    nodes = tuple(_reading(n, name, whole, pieces) for n in node.body.nodes)
    return replace(
        node,
        body=replace(node.body, tensors=tensors, nodes=nodes),
        reads=tuple(replace(s, outer=whole.name) if s.outer == name else s for s in node.reads),
        shared=tuple(whole.name if n == name else n for n in node.shared),
    )


def _moved_out(graph: Graph, name: str, cast: Op) -> Graph:
    """With a cast that is in a loop of the step, before it."""
    made = cast.outs[0]
    nodes: list[Node] = []
    tensors = dict(graph.tensors)
    for node in graph.nodes:
        if isinstance(node, Loop) and cast in node.body.nodes:
            inside = dict(node.body.tensors)
            tensors[made] = inside.pop(made)
            rest = tuple(n for n in node.body.nodes if n is not cast)
            node = replace(
                node, body=replace(node.body, tensors=inside, nodes=rest),
                shared=tuple(made if n == name else n for n in node.shared),
            )  # fmt: skip
            nodes.append(cast)
        nodes.append(node)
    return replace(graph, tensors=tensors, nodes=tuple(nodes))
