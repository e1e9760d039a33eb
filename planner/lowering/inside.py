"""Passes that TPUs' compiler computes inside of products of activations, as those of attention.

What is computed point by point for such products alone is never stored: each that reads it computes
it again, beside its arithmetic. And a reduction of what a product makes is made with it, unless it
depends on another reduction of the same. So of softmax between two products only the scores are
stored, and of its gradient only that of the probabilities. Seen with libtpu 0.0.52 on v4: counted
one by one, the passes of Llama 3 8B with 8192 positions made a step 40 % longer than the compiler
says, and its peak 28 % higher.

Products by weights are left alone. What their passes take by themselves is about what such a
product takes longer with them inside, and barriers between the gradients of their two operands make
the compiler store what both read (see planner.export.placement).

Nor is stored what is left in a loop of a cast that is made before (see planner.graph.ahead).

Attributes of ops, for what is lowered: `inside` of what is no pass of its own ("operand": never
stored, "result": made with a product), and `inner` of who computes it: (operand or -1 for the
result, operations and bytes for each of its elements).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass, field, replace

from costmodels.program import ITEM_BYTES
from planner.graph import expr as ex
from planner.graph.ahead import AHEAD, SLICE
from planner.graph.builder import contraction_sizes, volume
from planner.graph.core import Graph, Loop, Node, Op, Tensor
from planner.lowering.lower_op import local_elements

OPERAND, RESULT = "operand", "result"
_OTHERWISE = ("onehot", "epilogue", "in_products", "written", "picks")


def inside_products(graph: Graph) -> Graph:
    """The same graph, with these attributes."""
    return _marked(graph, graph.all_tensors(), graph.of_parameters(), {*graph.outputs})


def _marked(
    graph: Graph, tensors: Mapping[str, Tensor], weights: Set[str], kept: Collection[str]
) -> Graph:
    nodes: list[Node] = []
    for node in graph.nodes:
        if isinstance(node, Loop):
            handed_on = {k.exit for k in node.carries} | {s.inner for s in node.writes}
            node = replace(node, body=_marked(node.body, tensors, weights, handed_on))
        elif node.attrs.get(AHEAD) == SLICE:
            node = replace(node, attrs={**node.attrs, "inside": OPERAND})
        nodes.append(node)
    return replace(graph, nodes=tuple(_Scope(nodes, tensors, weights, kept).marked()))


@dataclass(frozen=True)
class _Work:
    """What making one element takes: operations, and the arrays of its size that are read."""

    operations: float
    sources: frozenset[str]


@dataclass
class _Scope:
    nodes: list[Node]
    tensors: Mapping[str, Tensor]
    weights: Set[str]
    kept: Collection[str]  # what is read outside
    inside: dict[str, _Work] = field(default_factory=dict)  # never stored
    joined: set[str] = field(default_factory=set)  # what reductions inside of products make
    inner: dict[str, list[tuple[int, float, float]]] = field(
        default_factory=lambda: defaultdict(list)
    )

    def __post_init__(self) -> None:
        self.ops = [n for n in self.nodes if isinstance(n, Op)]
        self.place = {o: i for i, n in enumerate(self.nodes) for o in n.outs}
        self.elsewhere = {i for n in self.nodes if isinstance(n, Loop) for i in n.ins}
        self.readers: dict[str, list[Op]] = defaultdict(list)
        for op in self.ops:
            for name in dict.fromkeys(op.ins):
                self.readers[name].append(op)
        self.products = {op.outs[0] for op in self.ops if self._of_activations(op)}

    def marked(self) -> list[Node]:
        if not self.products:
            return self.nodes
        for op in reversed(self.ops):  # readers before what they read
            if _pointwise(op) and self._only_inside(op.outs[0]):
                self.inside[op.outs[0]] = _Work(0, frozenset())
        for op in self.ops:
            if op.outs[0] in self.inside:
                self.inside[op.outs[0]] = self._work(op)
        for op in self.ops:
            if op.outs[0] not in self.inside:
                self._count(op)
        return [self._with_attributes(n) if isinstance(n, Op) else n for n in self.nodes]

    def _of_activations(self, op: Op) -> bool:
        """Gradients of weights are no products of like rows: they have no batch."""
        sizes = contraction_sizes(op) if op.kind == "map" else None
        return sizes is not None and sizes[0] > 1 and self.weights.isdisjoint(op.ins)

    def _only_inside(self, name: str) -> bool:
        """Whether all who read it are such products, or compute it on the way to one."""
        if name in self.kept or name in self.elsewhere:
            return False
        readers = self.readers[name]
        to_product = [r for r in readers if r.outs[0] in self.products | self.inside.keys()]
        return bool(to_product) and all(r in to_product or _reduces(r) for r in readers)

    def _work(self, op: Op) -> _Work:
        """Of an op, with what is computed inside of it."""
        operations, sources = float(ex.operations(op.attrs["exprs"][0])), set[str]()
        for name, dims in zip(op.ins, op.rule.ins, strict=True):
            if local_elements(op.rule, dims) == volume(op.rule):
                within = self.inside.get(name)
                operations += within.operations if within else 0.0
                sources |= within.sources if within else {name}
        return _Work(operations, frozenset(sources))

    def _bytes(self, names: Collection[str]) -> float:
        return float(sum(ITEM_BYTES[self.tensors[name].dtype] for name in names))

    def _count(self, op: Op) -> None:
        """What an op that remains computes besides, or which product computes it."""
        if _reduces(op):
            work = self._work(op)
            last = max(work.sources & self.products, key=self.place.__getitem__, default="")
            if last and self._known_before(op, last):
                self.joined.add(op.outs[0])
                read = self._bytes(work.sources - {last})
                self.inner[last].append((-1, work.operations, read))
                return
        for slot, name in enumerate(op.ins):
            within = self.inside.get(name)
            if within is not None:
                more = self._bytes(within.sources) - self._bytes([name])
                self.inner[op.outs[0]].append((slot, within.operations, more))

    def _known_before(self, op: Op, product: str) -> bool:
        """Whether all else that a reduction reads is there when the product is made."""
        others = {leaf for name in op.ins for leaf in self._leaves(name)} - {product}
        return all(self.place.get(name, -1) < self.place[product] for name in others)

    def _leaves(self, name: str) -> set[str]:
        """What is stored of all that something inside is made of."""
        if name not in self.inside:
            return {name}
        maker = self.nodes[self.place[name]]
        return {leaf for i in maker.ins for leaf in self._leaves(i)}

    def _with_attributes(self, op: Op) -> Op:
        attrs = dict(op.attrs)
        if op.outs[0] in self.inside:
            attrs["inside"] = OPERAND
        elif op.outs[0] in self.joined:
            attrs["inside"] = RESULT
        elif op.outs[0] in self.inner:
            attrs["inner"] = tuple(self.inner[op.outs[0]])
        else:
            return op
        return replace(op, attrs=attrs)


def _pass(op: Op) -> bool:
    plain = op.kind == "map" and len(op.outs) == 1 and contraction_sizes(op) is None
    return plain and not any(op.attrs.get(name) for name in _OTHERWISE)


def _pointwise(op: Op) -> bool:
    """Whether an op computes every element of what it makes from one of each array it reads, one of
    these as large."""
    if not _pass(op) or any(f.kind == "reduce" for f in op.rule.factors):
        return False
    return any(local_elements(op.rule, dims) == volume(op.rule) for dims in op.rule.ins)


def _reduces(op: Op) -> bool:
    return _pass(op) and any(f.kind == "reduce" for f in op.rule.factors)
