"""Meshes of many axes: plans in which two axes always go together.

The number of choices grows with the power of the number of axes. Two tied axes count as one
whose size is their product; a plan of the tied mesh is a plan of the whole one, with the same
collectives on the same links. Only tying and untying belong here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

from meshes import LogicalMesh, Part
from planner.pins import Annotation
from planner.plan import Plan
from planner.sharding.choices import Choice
from planner.sharding.spec import Spec

Pair = tuple[str, str]


def tied_meshes(mesh: LogicalMesh, annotation: Annotation) -> Iterator[tuple[Pair, LogicalMesh]]:
    """Meshes with two neighbouring axes tied that no annotation separates."""
    splitting = [name for name, size in mesh.axes if size > 1]
    for pair in pairwise(splitting):
        if all(_together(axes, pair) for dims in annotation.values() for axes in dims):
            yield pair, _tied(mesh, pair)


def _together(axes: Sequence[str], pair: Pair) -> bool:
    """Whether a dimension has both axes, one right after the other, or none."""
    listed = list(axes)
    if pair[0] not in listed and pair[1] not in listed:
        return True
    at = listed.index(pair[0]) if pair[0] in listed else -1
    return at >= 0 and listed[at + 1 : at + 2] == [pair[1]]


def tie_name(pair: Pair) -> str:
    return "*".join(pair)


def _tied(mesh: LogicalMesh, pair: Pair) -> LogicalMesh:
    """`pair` becomes one axis at the place of its first member; the links stay as they are."""
    sizes = dict(mesh.axes)
    name = tie_name(pair)
    axes = tuple(
        (name, sizes[pair[0]] * sizes[pair[1]]) if axis == pair[0] else (axis, size)
        for axis, size in mesh.axes
        if axis != pair[1]
    )
    parts = tuple(
        Part(name if p.axis in pair else p.axis, p.dim, p.size, p.stride) for p in mesh.parts
    )
    return LogicalMesh(mesh.topology, axes, parts)


def tied_annotation(annotation: Annotation, pair: Pair) -> Annotation:
    """The same annotation in the names of the tied mesh."""
    name = tie_name(pair)
    return {
        tensor: tuple(
            tuple(name if a == pair[0] else a for a in axes if a != pair[1]) for axes in dims
        )
        for tensor, dims in annotation.items()
    }


def untied(plan: Plan, pair: Pair, mesh: LogicalMesh) -> Plan:
    """`plan` of the tied mesh as a plan of `mesh`."""
    name, order = tie_name(pair), [axis for axis, _ in mesh.axes]

    def axes(tied: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(a for axis in tied for a in (pair if axis == name else (axis,)))

    def in_order(tied: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(sorted(axes(tied), key=order.index))

    choices = {
        op: Choice(
            tuple(axes(a) for a in choice.split),
            tuple((group, in_order(a)) for group, a in choice.passed),
        )
        for op, choice in plan.choices.items()
    }
    homes = {
        tensor: Spec(tuple(axes(d) for d in spec.dims), in_order(spec.partial))
        for tensor, spec in plan.homes.items()
    }
    return replace(plan, axes=mesh.axes, choices=choices, homes=homes)
