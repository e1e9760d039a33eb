"""Completing a few annotations the way a compiler does: from tensor to tensor through the ops.

Pure rules on a graph, no prices: given specs are kept, everything else starts whole and is only
ever split further. As in GSPMD (section 3.5 of its paper), ops that map dimensions one to one go
first, ops that sum or contract last; information flows forward and backward, shardings of
different dimensions are merged, and the tensors that a loop hands on lie alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from planner.graph.builder import contraction_sizes
from planner.graph.core import Dims, Graph, Loop, Op, Rule
from planner.sharding.choices import WHOLE_KINDS, WHOLE_NAMES
from planner.sharding.spec import Sizes, Spec, replicated

ONE_TO_ONE, CHANGES_DIMS, CONTRACTS = range(3)  # priorities, the first goes first
Axes = tuple[str, ...]


@dataclass(frozen=True)
class _Link:
    """Tensors whose dimensions are made of common factors; `ins` comes before `outs`."""

    priority: int
    sizes: tuple[int, ...]  # of the factors; 0 for one that must stay whole
    ins: tuple[tuple[str, Dims], ...]
    outs: tuple[tuple[str, Dims], ...]


def propagate(
    graph: Graph, given: Mapping[str, Spec], sizes: Sizes, smallest: bool = False
) -> dict[str, Spec]:
    """The spec of every tensor of a forward graph; `given` ones (with all dimensions) are kept.

    Where several tensors at an op disagree, the largest is followed, or the `smallest`.
    """
    tensors = graph.all_tensors()
    specs = {name: replicated(len(t.shape)) for name, t in tensors.items()}
    specs.update(given)
    links = list(_links(graph))
    priority = ONE_TO_ONE
    while priority <= CONTRACTS:
        chosen = [link for link in links if link.priority <= priority]
        changed = False
        for backward in (False, True):
            for link in reversed(chosen) if backward else chosen:
                changed |= _pass(link, backward, specs, given, sizes, smallest)
        # News may let an op of higher priority decide what lower ones would decide otherwise.
        priority = ONE_TO_ONE if changed else priority + 1
    return specs


def _links(graph: Graph) -> Iterator[_Link]:
    """In the order of execution."""
    for node in graph.nodes:
        if isinstance(node, Op):
            yield _op_link(node)
            continue
        tensors = graph.tensors
        for read in node.reads:
            yield _slice_link(tensors[read.outer].shape, read.outer, read.inner, True)
        yield from _handed_on(node)
        yield from _links(node.body)
        yield from reversed(list(_handed_on(node)))
        for write in node.writes:
            yield _slice_link(tensors[write.outer].shape, write.outer, write.inner, False)


def _handed_on(loop: Loop) -> Iterator[_Link]:
    for carry in loop.carries:
        shape = loop.body.tensors[carry.entry].shape
        dims = tuple((i,) for i in range(len(shape)))
        for before, after in (
            (carry.init, carry.entry), (carry.entry, carry.exit), (carry.exit, carry.result),
        ):  # fmt: skip
            yield _Link(ONE_TO_ONE, shape, ((before, dims),), ((after, dims),))


def _slice_link(shape: Sequence[int], outer: str, inner: str, reads: bool) -> _Link:
    stack = tuple((i,) for i in range(len(shape)))
    ends = ((outer, stack),), ((inner, stack[1:]),)
    before, after = ends if reads else ends[::-1]
    return _Link(ONE_TO_ONE, (0, *shape[1:]), before, after)


def _op_link(op: Op) -> _Link:
    rule = op.rule
    sizes = tuple(
        0 if f.kind in WHOLE_KINDS or f.name in WHOLE_NAMES else f.size for f in rule.factors
    )
    return _Link(
        _priority(op), sizes, tuple(zip(op.ins, rule.ins, strict=True)),
        tuple(zip(op.outs, rule.outs, strict=True)),
    )  # fmt: skip


def _priority(op: Op) -> int:
    if contraction_sizes(op) is not None:
        return CONTRACTS
    return ONE_TO_ONE if _one_to_one(op.rule) else CHANGES_DIMS


def _one_to_one(rule: Rule) -> bool:
    return len({frozenset(f for d in dims for f in d) for dims in (*rule.ins, *rule.outs)}) == 1


def _pass(
    link: _Link, backward: bool, specs: dict[str, Spec], given: Mapping[str, Spec],
    sizes: Sizes, smallest: bool,
) -> bool:  # fmt: skip
    """Splits the tensors behind the link further; whether it did."""
    sources, targets = (link.outs, link.ins) if backward else (link.ins, link.outs)
    if backward and link.priority == CONTRACTS:
        sources = (*sources, *link.ins)  # what is contracted is only known to the other operand
    # Where two disagree, moving the larger tensor would cost more.
    known = sorted(
        sources, key=lambda source: _elements(source[1], link.sizes), reverse=not smallest
    )
    changed = False
    for name, dims in targets:
        if name in given:
            continue
        for source, source_dims in known:
            if source == name:
                continue
            factors = _factor_axes(source_dims, specs[source], link.sizes, sizes)
            merged = _merged(specs[name], dims, factors, link.sizes, sizes)
            changed |= merged != specs[name]
            specs[name] = merged
    return changed


def _elements(dims: Dims, of_factors: Sequence[int]) -> int:
    return prod(max(of_factors[f], 1) for d in dims for f in d)


def _factor_axes(
    dims: Dims, spec: Spec, of_factors: Sequence[int], sizes: Sizes
) -> dict[int, Axes]:
    """Which axes split which factor: the major factors of a dimension first."""
    found: dict[int, Axes] = {}
    for factors, axes in zip(dims, spec.dims, strict=True):
        rest = axes
        for factor in factors:
            count = 0
            while count < len(rest) and _divides(of_factors[factor], rest[: count + 1], sizes):
                count += 1
            found[factor], rest = rest[:count], rest[count:]
            if prod(sizes[a] for a in found[factor]) != of_factors[factor]:
                break
    return found


def _merged(
    spec: Spec, dims: Dims, wanted: Mapping[int, Axes], of_factors: Sequence[int], sizes: Sizes
) -> Spec:
    """`spec` split further where the factors say so and nothing contradicts."""
    found = list(spec.dims)
    for i, factors in enumerate(dims):
        axes: Axes = ()
        for factor in factors:
            axes += wanted.get(factor, ())
            if prod(sizes[a] for a in wanted.get(factor, ())) != of_factors[factor]:
                break
        while axes and not _extends(axes, i, found):
            axes = axes[:-1]
        if axes:
            found[i] = axes
    return Spec(tuple(found))


def _extends(axes: Axes, at: int, dims: Sequence[Axes]) -> bool:
    elsewhere = {a for i, d in enumerate(dims) if i != at for a in d}
    return axes[: len(dims[at])] == dims[at] and not elsewhere.intersection(axes)


def _divides(size: int, axes: Axes, sizes: Sizes) -> bool:
    return size > 0 and size % prod(sizes[a] for a in axes) == 0
