"""Gradients that stay unreduced sums until the last microbatch.

XLA reduces what a loop carries in every turn. So a program whose plan does not is mapped
(`jax.vmap`) over the groups of devices along some axes: each adds up gradients of its own part of
every microbatch, and the sums have a dimension of groups until the loop is done. Whether that is
the plan, and where things lie for one group, is found here; what it computes is in
planner.graph.parting, the writing in `jax_sources`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from costmodels.program import ITEM_BYTES
from planner.export.placement import Copy, Gradient, Placement, Use
from planner.graph.builder import contraction_sizes
from planner.graph.core import Graph, Tensor
from planner.graph.derive import ACCUMULATE, added_up
from planner.graph.parting import NotAlone, part_alone
from planner.result import Result
from planner.sharding.spec import Spec

MINOR = 0.01  # of all gradients: fewer need not wait
MOST = 0.1  # of all gradients: if no more do not wait, they may as well
STRAY = 0.05  # of activations may lie otherwise along these axes


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
    of which they are not. Raises NotAlone if some wait over a part of these axes."""
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
        raise NotAlone(f"that of {partly[0]} waits over a part of {' and '.join(axes)}")
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
    and receives; not every stage makes a `loss`. Raises NotAlone."""
    axes, reduced = _waiting(result)
    if not axes:
        return None
    for op, _ in result.model.graph.walk():
        if "conv" in op.kind:  # mapped, its gradient would be one convolution of many groups
            raise NotAlone(f"{op.name} is a convolution")
    graph, count = result.model.graph, prod(result.plan.sizes[a] for a in axes)
    of_one, split = part_alone(graph, count, _largest_split(graph, place, axes), sent, loss)
    _check_strays(graph, place, axes, split)
    given = {n: d for n, d in split.items() if n in graph.inputs or n in sent}
    whole = frozenset(graph.of_parameters(reduced))
    return Groups(
        axes, count, of_one, given, _sums(result, axes, reduced), frozenset(reduced), whole,
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
        raise NotAlone(f"{' and '.join(axes)} split no activation")
    return best[1], best[2]


def _activations(graph: Graph) -> dict[str, Tensor]:
    weights = graph.of_parameters()
    return {n: t for n, t in graph.all_tensors().items() if n not in weights}


def _check_strays(
    graph: Graph, place: Placement, axes: Sequence[str], split: Mapping[str, int]
) -> None:
    """That hardly any activations lie otherwise along these axes than by groups."""

    def astray(name: str, spec: Spec) -> bool:
        return any(
            not set(axes).isdisjoint(by)
            and (d != split.get(name) or by[: len(axes)] != tuple(axes))
            for d, by in enumerate(spec.dims)
        )

    held = {
        n: t.elements * ITEM_BYTES[t.dtype] for n, t in _activations(graph).items()
        if n in place.tensors and n not in graph.inputs
    }  # fmt: skip
    stray = {n: own for n, own in held.items() if astray(n, place.tensors[n])}
    if sum(stray.values()) > STRAY * sum(held.values()):
        raise NotAlone(f"they split {max(stray, key=lambda n: stray[n])} otherwise")


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
        if use[1] in whole and use[0] in products:
            return read
        return replace(read, made=one(g.made), way=all_of(g.way), home=one(g.home))

    apart = {n: s if n in whole else all_of(s) for n, s in place.apart.items()}
    for name, spec in _read_at(place, graph, weights).items():
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


def _read_at(place: Placement, graph: Graph, weights: Collection[str]) -> dict[str, Spec]:
    """Where parameters, their slices in loops and what is made of them alone lie inside."""
    found = {n: s for n, s in place.tensors.items() if n in weights}
    found |= {n: places[-1] for n, places in place.held.items()}
    for loop in graph.loops():
        for s in loop.reads:
            if s.outer in found:
                found[s.inner] = Spec(found[s.outer].dims[1:])
    return found
