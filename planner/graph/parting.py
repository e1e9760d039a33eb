"""One of several equal parts of a forward graph, cut along a dimension, computed by itself.

What is cut is followed from factor to factor: dimensions that share one in some op are cut alike.
Sums over a cut dimension leave every part a summand, which may only pass through linear ops.
Whatever else needs another part is refused. Nothing here knows devices or plans.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from planner.graph import expr as ex
from planner.graph.core import Dims, Graph, Loop, Node, Op, Tensor


class NotAlone(ValueError):
    """Groups of devices cannot compute parts by themselves; the message says why."""


def part_alone(
    graph: Graph, count: int, seed: tuple[str, int], handed_on: Collection[str], loss: bool
) -> tuple[Graph, Mapping[str, int]]:
    """The graph of one of `count` parts, and the dimension of every tensor that they divide.

    `seed`: a tensor and its dimension to begin with. `handed_on`: tensors that have to be divided.
    With a `loss` the first output has to be the sum of the parts' own. Raises NotAlone.
    """
    found = _Parting(graph, count)
    found.spread(seed)
    found.check(handed_on, loss)
    return found.of_one(graph), {name: min(dims) for name, dims in found.split.items()}


@dataclass
class _Parting:
    """`split`: tensor → the dimensions that parts divide; `partial`: of which each part has a
    summand."""

    graph: Graph
    count: int
    split: dict[str, set[int]] = field(default_factory=dict)
    partial: set[str] = field(default_factory=set)

    def spread(self, seed: tuple[str, int]) -> None:
        """From one dimension to all that share a factor with it in some op."""
        self.split, known = {seed[0]: {seed[1]}}, 0
        while (found := sum(map(len, self.split.values()))) > known:
            known = found
            self._scope(self.graph.nodes)

    def _scope(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            if isinstance(node, Op):
                self._op(node)
                continue
            self._around(node)
            self._scope(node.body.nodes)
            self._around(node)

    def _around(self, loop: Loop) -> None:
        """What a loop hands in and out is cut alike on both sides."""
        for k in loop.carries:
            names = k.init, k.entry, k.exit, k.result
            dims = {d for n in names for d in self.split.get(n, ())}
            for n in names if dims else ():
                self.split.setdefault(n, set()).update(dims)
        for s in (*loop.reads, *loop.writes):
            outer, inner = (self.split.get(n, set()) for n in (s.outer, s.inner))
            if 0 in outer:
                raise NotAlone(f"they divide the layers of {s.outer}")
            if dims := {d - 1 for d in outer} | inner:
                self.split[s.inner] = dims
                self.split[s.outer] = {d + 1 for d in dims}

    def _op(self, op: Op) -> None:
        split = self.factors(op)
        for name, dims in _sides(op):
            for d, factors in enumerate(dims):
                cut = split.intersection(factors)
                if cut and cut != {factors[0]}:
                    raise NotAlone(f"{op.name} has the parts of groups apart in {name}")
                if cut:
                    self.split.setdefault(name, set()).add(d)

    def factors(self, op: Op) -> set[int]:
        """The factors of an op that groups divide."""
        sides = _sides(op)
        return {
            dims[d][0] for name, dims in sides for d in self.split.get(name, ()) if dims[d]
        }

    # ---- whether a part can be computed alone ---------------------------------------------------

    def check(self, handed_on: Collection[str], loss: bool) -> None:
        for name, t in self.graph.all_tensors().items():
            if (cut := self.split.get(name)) is None:
                continue
            if t.role == "parameter":
                raise NotAlone(f"they split what reads the parameter {name}")
            if len(cut) > 1 or t.shape[min(cut)] % self.count:
                raise NotAlone(f"{name} has no equal part for each of {self.count} groups")
        self._check_scope(self.graph.nodes)
        for name in handed_on:
            if name not in self.split:
                raise NotAlone(f"{name} is sent on whole")
        if loss and self.graph.outputs[0] not in self.partial:
            raise NotAlone("the loss is no sum over them")

    def _check_scope(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            if isinstance(node, Op):
                self._check_op(node)
            else:
                self._check_loop(node)

    def _check_loop(self, loop: Loop) -> None:
        for s in loop.reads:
            self._same(s.outer, s.inner)
        for k in loop.carries:
            self._same(k.init, k.entry)
        self._check_scope(loop.body.nodes)
        for k in loop.carries:
            if (k.exit in self.partial) != (k.entry in self.partial):
                raise NotAlone(f"{k.result} adds up over groups in a loop")
            self._same(k.exit, k.result)
        for s in loop.writes:
            self._same(s.inner, s.outer)

    def _same(self, source: str, target: str) -> None:
        if source in self.partial:
            self.partial.add(target)

    def _check_op(self, op: Op) -> None:
        split, rule = self.factors(op), op.rule
        kinds = {rule.factors[f].kind for f in split}
        windows = {f for pair in rule.windows for f in pair}
        if not kinds <= {"parallel", "reduce"} or windows & split:
            raise NotAlone(f"{op.name} needs what other groups have")
        names = {rule.factors[f].name for f in split}
        exprs = op.attrs.get("exprs", ())
        if any(names & ex.index_factors(e) for e in exprs):
            raise NotAlone(f"{op.name} asks for places in the batch")
        summands = tuple(i for i, name in enumerate(op.ins) if name in self.partial)
        if summands and (split or summands not in rule.linear):
            raise NotAlone(f"{op.name} is not linear in a sum over them")
        for name, dims in zip(op.outs, rule.outs, strict=True):
            made = {f for d in dims for f in d}
            if summands or split - made:
                self.partial.add(name)
        if split - {f for dims in rule.outs for d in dims for f in d} and rule.combiner != "sum":
            raise NotAlone(f"{op.name} takes a maximum over them")

    # ---- the graph of one part ------------------------------------------------------------------

    def of_one(self, graph: Graph) -> Graph:
        tensors = {n: replace(t, shape=self._shape(t)) for n, t in graph.tensors.items()}
        return replace(graph, tensors=tensors, nodes=tuple(map(self._node, graph.nodes)))

    def _shape(self, t: Tensor) -> tuple[int, ...]:
        cut = self.split.get(t.name, ())
        return tuple(n // self.count if d in cut else n for d, n in enumerate(t.shape))

    def _node(self, node: Node) -> Node:
        if isinstance(node, Loop):
            return replace(node, body=self.of_one(node.body))
        split = self.factors(node)
        factors = tuple(
            replace(f, size=f.size // self.count) if i in split else f
            for i, f in enumerate(node.rule.factors)
        )
        return replace(node, rule=replace(node.rule, factors=factors))


def _sides(op: Op) -> Iterator[tuple[str, Dims]]:
    yield from zip((*op.ins, *op.outs), (*op.rule.ins, *op.rule.outs), strict=True)
