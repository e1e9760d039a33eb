"""Gradients that stay unreduced sums until the last microbatch.

XLA reduces what a loop carries in every turn. So a program whose plan does not is mapped
(`jax.vmap`) over the groups of devices along some axes: each adds up gradients of its own part of
every microbatch, and the sums have a dimension of groups until the loop is done. Whether that is
the plan, and the graph that one group computes, is found here; the writing is in `jax_sources`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

from costmodels.program import ITEM_BYTES
from planner.export.placement import Copy, Gradient, Placement, Use
from planner.graph import expr as ex
from planner.graph.builder import contraction_sizes
from planner.graph.core import Dims, Graph, Loop, Node, Op, Rule, Tensor
from planner.graph.derive import ACCUMULATE, added_up
from planner.result import Result
from planner.sharding.spec import Spec

MINOR = 0.01  # of all gradients: fewer need not wait
MOST = 0.1  # of all gradients: if no more do not wait, they may as well
STRAY = 0.05  # of activations may lie otherwise along these axes


class Mixed(ValueError):
    """Groups of devices do not work by themselves; the message says why."""


@dataclass(frozen=True)
class Groups:
    """`axes`: those of the groups, major first, `count` groups. `graph`: what one group computes.
    `split`: inputs and what is sent on that have a part for every group → the dimension, in one
    microbatch. `sums`: parameter → where a group adds up its gradient, and where the sum of all is
    read. `reduced`: parameters whose gradients are summed over groups in every microbatch; `whole`:
    these, their pieces and what is made of them alone, which groups have in common. `place`: where
    all else lies, as one group has it."""

    axes: tuple[str, ...]
    count: int
    graph: Graph
    split: Mapping[str, int]
    sums: Mapping[str, tuple[Spec, Spec]]
    reduced: frozenset[str]
    whole: frozenset[str]
    place: Placement


def _waiting(result: Result) -> tuple[tuple[str, ...], set[str]]:
    """Mesh axes over which gradients are summed after the last microbatch only, and the parameters
    of which they are not. Raises Mixed if some wait over a part of these axes."""
    tensors, sums = result.graph.all_tensors(), _accumulators(result)
    whole = sum(tensors[p].elements for p in sums)

    def share(names: Iterable[str]) -> float:
        return sum(tensors[p].elements for p in names) / max(whole, 1)

    axes = tuple(
        axis for axis in result.plan.sizes
        if share(p for p in sums if axis in sums[p].partial) > MINOR
    )  # fmt: skip
    reduced = {p for p, spec in sums.items() if not set(axes) <= set(spec.partial)}
    partly = sorted(p for p in reduced if not set(axes).isdisjoint(sums[p].partial))
    if share(partly) > MINOR:
        raise Mixed(f"that of {partly[0]} waits over a part of {' and '.join(axes)}")
    return axes, reduced if share(reduced) > MOST else set()


def _accumulators(result: Result) -> dict[str, Spec]:
    """Parameter → how what microbatches add up for its gradient lies."""
    loops = (loop for loop in result.graph.loops() if loop.name == ACCUMULATE)
    names = {k.entry for loop in loops for k in loop.carries}
    sums = {p.name: added_up(result.graph, p.name) for p in result.model.graph.parameters()}
    return {p: result.specs[name] for p, name in sums.items() if name in names}


def grouped(
    result: Result, place: Placement, sent: Collection[str] = (), loss: bool = True
) -> Groups | None:
    """How the plan's sums can wait; None if none of them do. `sent`: what a pipeline's stage sends
    on, of which not every one makes a `loss`. Raises Mixed."""
    axes, reduced = _waiting(result)
    if not axes:
        return None
    graph, count = result.model.graph, prod(result.plan.sizes[a] for a in axes)
    found = _Spread(graph, count)
    found.begin(_largest_split(graph, place, axes))
    found.check(sent, loss)
    _check_strays(graph, place, axes, found.split)
    outer = {*graph.inputs, *sent}
    split = {n: min(d) for n, d in found.split.items() if n in outer}
    whole = frozenset(graph.of_parameters(reduced))
    return Groups(
        axes, count, found.of_one(), split, _sums(result, axes, reduced), frozenset(reduced), whole,
        _inside(place, graph, axes, whole),
    )  # fmt: skip


def _sums(
    result: Result, axes: Sequence[str], reduced: Collection[str]
) -> dict[str, tuple[Spec, Spec]]:
    read = {
        op.ins[0]: result.plan.choices[op.name].operand(op.rule, 1)
        for op, _ in result.graph.walk()
        if op.phase == "update" and len(op.ins) > 1 and op.name in result.plan.choices
    }
    found = {}
    for name, spec in _accumulators(result).items():
        wanted = read.get(name)
        lies = result.specs[name] if wanted is None or wanted.partial else wanted
        each = spec if name in reduced else _without(spec, axes)
        found[name] = each.without_partial(), lies
    return found


# ---- which dimensions groups divide --------------------------------------------------------------


def _largest_split(graph: Graph, place: Placement, axes: Sequence[str]) -> tuple[str, int]:
    """The dimension of the largest activation that the axes split first."""
    best: tuple[int, str, int] | None = None
    for name, t in _activations(graph).items():
        spec = place.tensors.get(name)
        for d, by in enumerate(() if spec is None else spec.dims):
            if by[: len(axes)] == tuple(axes) and (best is None or t.elements > best[0]):
                best = t.elements, name, d
    if best is None:
        raise Mixed(f"{' and '.join(axes)} split no activation")
    return best[1], best[2]


def _activations(graph: Graph) -> dict[str, Tensor]:
    weights = graph.of_parameters()
    return {n: t for n, t in graph.all_tensors().items() if n not in weights}


@dataclass
class _Spread:
    """From one dimension to all that are cut with it: those that share a factor in some op."""

    graph: Graph
    count: int
    split: dict[str, set[int]] = field(default_factory=dict)
    partial: set[str] = field(default_factory=set)  # of which every group has a summand

    def begin(self, seed: tuple[str, int]) -> None:
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
                raise Mixed(f"they divide the layers of {s.outer}")
            if dims := {d - 1 for d in outer} | inner:
                self.split[s.inner] = dims
                self.split[s.outer] = {d + 1 for d in dims}

    def _op(self, op: Op) -> None:
        split = self.factors(op)
        for name, dims in _sides(op):
            for d, factors in enumerate(dims):
                cut = split.intersection(factors)
                if cut and cut != {factors[0]}:
                    raise Mixed(f"{op.name} has the parts of groups apart in {name}")
                if cut:
                    self.split.setdefault(name, set()).add(d)

    def factors(self, op: Op) -> set[int]:
        """The factors of an op that groups divide."""
        sides = _sides(op)
        return {
            dims[d][0] for name, dims in sides for d in self.split.get(name, ()) if dims[d]
        }

    # ---- whether groups then work by themselves -----------------------------------------------

    def check(self, sent: Collection[str], loss: bool) -> None:
        for name, t in self.graph.all_tensors().items():
            if (cut := self.split.get(name)) is None:
                continue
            if t.role == "parameter":
                raise Mixed(f"they split what reads the parameter {name}")
            if len(cut) > 1 or t.shape[min(cut)] % self.count:
                raise Mixed(f"{name} has no equal part for each of {self.count} groups")
        self._check_scope(self.graph.nodes)
        for name in sent:
            if name not in self.split:
                raise Mixed(f"{name} is sent on whole")
        if loss and self.graph.outputs[0] not in self.partial:
            raise Mixed("the loss is no sum over them")

    def _check_scope(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            if isinstance(node, Op):
                self._check_op(node)
            else:
                self._check_loop(node)

    def _check_loop(self, loop: Loop) -> None:
        for s in loop.reads:
            self._same((s.outer,), (s.inner,))
        for k in loop.carries:
            self._same((k.init,), (k.entry,))
        self._check_scope(loop.body.nodes)
        for k in loop.carries:
            if (k.exit in self.partial) != (k.entry in self.partial):
                raise Mixed(f"{k.result} adds up over groups in a loop")
            self._same((k.exit,), (k.result,))
        for s in loop.writes:
            self._same((s.inner,), (s.outer,))

    def _same(self, sources: Sequence[str], targets: Sequence[str]) -> None:
        if self.partial.intersection(sources):
            self.partial.update(targets)

    def _check_op(self, op: Op) -> None:
        split, rule = self.factors(op), op.rule
        kinds = {rule.factors[f].kind for f in split}
        windows = {f for pair in rule.windows for f in pair}
        if not kinds <= {"parallel", "reduce"} or windows & split or "conv" in op.kind:
            raise Mixed(f"{op.name} needs what other groups have")
        names = {rule.factors[f].name for f in split}
        exprs = op.attrs.get("exprs", ())
        if any(names & ex.index_factors(e) for e in exprs):
            raise Mixed(f"{op.name} asks for places in the batch")
        summands = tuple(i for i, name in enumerate(op.ins) if name in self.partial)
        if summands and (split or summands not in rule.linear):
            raise Mixed(f"{op.name} is not linear in a sum over them")
        for name, dims in zip(op.outs, rule.outs, strict=True):
            made = {f for d in dims for f in d}
            if summands or split - made:
                self.partial.add(name)
        if split - {f for dims in rule.outs for d in dims for f in d} and rule.combiner != "sum":
            raise Mixed(f"{op.name} takes a maximum over them")

    # ---- what one group computes ---------------------------------------------------------------

    def of_one(self) -> Graph:
        return self._cut(self.graph)

    def _cut(self, graph: Graph) -> Graph:
        tensors = {n: replace(t, shape=self._shape(t)) for n, t in graph.tensors.items()}
        return replace(graph, tensors=tensors, nodes=tuple(map(self._node, graph.nodes)))

    def _shape(self, t: Tensor) -> tuple[int, ...]:
        cut = self.split.get(t.name, ())
        return tuple(n // self.count if d in cut else n for d, n in enumerate(t.shape))

    def _node(self, node: Node) -> Node:
        if isinstance(node, Loop):
            return replace(node, body=self._cut(node.body))
        split = self.factors(node)
        factors = tuple(
            replace(f, size=f.size // self.count) if i in split else f
            for i, f in enumerate(node.rule.factors)
        )
        return replace(node, rule=replace(node.rule, factors=factors))


def _sides(op: Op) -> Iterator[tuple[str, Dims]]:
    rule: Rule = op.rule
    yield from zip((*op.ins, *op.outs), (*rule.ins, *rule.outs), strict=True)


def _check_strays(
    graph: Graph, place: Placement, axes: Sequence[str], split: Mapping[str, set[int]]
) -> None:
    """That hardly any activations lie otherwise along these axes than by groups."""

    def astray(name: str, spec: Spec) -> bool:
        return any(
            not set(axes).isdisjoint(by)
            and (d not in split.get(name, ()) or by[: len(axes)] != tuple(axes))
            for d, by in enumerate(spec.dims)
        )

    held = {
        n: t.elements * ITEM_BYTES[t.dtype] for n, t in _activations(graph).items()
        if n in place.tensors and n not in graph.inputs
    }  # fmt: skip
    stray = {n: own for n, own in held.items() if astray(n, place.tensors[n])}
    if sum(stray.values()) > STRAY * sum(held.values()):
        raise Mixed(f"they split {max(stray, key=lambda n: stray[n])} otherwise")


# ---- shardings inside ----------------------------------------------------------------------------


def _without(spec: Spec, axes: Sequence[str]) -> Spec:
    return Spec(
        tuple(tuple(a for a in by if a not in axes) for by in spec.dims),
        tuple(a for a in spec.partial if a not in axes),
    )


def _inside(
    place: Placement, graph: Graph, axes: Sequence[str], whole: frozenset[str]
) -> Placement:
    """The placement of what one group computes. Parameters and what is made of them alone lie as
    before, and so do the gradients of those that groups have in common (`whole`)."""

    def inner(spec: Spec) -> Spec:
        return _without(spec, axes)

    def all_of(specs: Iterable[Spec | None]) -> tuple[Spec, ...]:
        return tuple(inner(s) for s in specs if s is not None)

    def one(spec: Spec | None) -> Spec | None:
        return None if spec is None else inner(spec)

    tensors, weights = graph.all_tensors(), graph.of_parameters()
    common = {op.name for op, _ in graph.walk() if whole.issuperset(op.outs)}
    # Gradients of what these read are made of all groups at once; of other ops, summed afterwards.
    products = {
        op.name for op, _ in graph.walk()
        if contraction_sizes(op) and len({tensors[n].dtype for n in (*op.ins, *op.outs)}) == 1
    }  # fmt: skip

    def copy(node: str, name: str, c: Copy) -> Copy:
        if node in common or (node in products and name in whole):
            return c
        if name in weights:
            return Copy(c.spec, c.bound, c.way, inner(c.gradient or c.spec) if c.bound else None)
        return Copy(inner(c.spec), c.bound, all_of(c.way), one(c.gradient))

    def gradient(use: Use, g: Gradient) -> Gradient:
        read = replace(g, cotangent=all_of(g.cotangent), other=all_of(g.other))
        if use[1] in whole:
            return read
        return replace(read, made=one(g.made), way=all_of(g.way), home=one(g.home))

    apart = {n: s if n in whole else all_of(s) for n, s in place.apart.items()}
    for name, spec in _read_at(place, graph).items():
        if name not in whole and not set(axes).isdisjoint(spec.axes):
            apart.setdefault(name, (inner(spec),))
    made = tensors.keys() - {*graph.inputs, *weights}
    return replace(
        place,
        tensors={n: inner(s) if n in made else s for n, s in place.tensors.items()},
        uses={use: copy(*use, c) for use, c in place.uses.items()},
        sums={n: s if n in weights else inner(s) for n, s in place.sums.items()},
        gradients={use: gradient(use, g) for use, g in place.gradients.items()},
        apart=apart,
        rounds={n: (inner(r), one(g)) for n, (r, g) in place.rounds.items()},
    )


def _read_at(place: Placement, graph: Graph) -> dict[str, Spec]:
    """Where parameters, their slices in loops and what is made of them alone lie inside."""
    found = {n: s for n, s in place.tensors.items() if n in graph.of_parameters()}
    found |= {n: places[-1] for n, places in place.held.items()}
    for loop in graph.loops():
        for s in loop.reads:
            if s.outer in found:
                found[s.inner] = Spec(found[s.outer].dims[1:])
    return found
