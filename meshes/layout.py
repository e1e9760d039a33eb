"""Which logical axis owns which physical dimension, or which part of one.

Every physical dimension is cut into ordered parts and every part belongs to one axis; the
parts of an axis multiply to its size. On a torus the search takes the fewest parts, so an axis
gets whole dimensions where that is possible: a part of a dimension loses the wraparound or
shares its links. Among those it takes the fastest links, and among equals, as on switched
machines always, the layout closest to row-major: first axis outermost.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import gcd, prod

from meshes.errors import MeshError
from meshes.links import Level, Part, build_group
from meshes.topology import Topology

Amounts = tuple[tuple[int, ...], ...]  # [axis][dimension]: size of the part


def assign(topology: Topology, axes: Sequence[tuple[str, int]]) -> tuple[Part, ...]:
    """Best layout of `axes` (name, size), or MeshError `no-layout`."""
    sizes = [d.size for d in topology.links]
    switched = all(d.kind in ("switch", "network") for d in topology.links)
    row_major = _row_major(sizes, [n for _, n in axes])
    if row_major is not None and (switched or len(axes) == 1):
        return parts_of(axes, row_major)
    best = min(
        (parts_of(axes, amounts) for amounts in _amounts(sizes, [n for _, n in axes])),
        key=lambda p: (len(p), _badness(topology, axes, p), _order(p, axes, len(sizes))),
        default=None,
    )
    if best is None:
        raise MeshError(
            "no-layout",
            f"no way to lay {_shape_text(axes)} on {topology.name}: physical dimensions "
            f"{'×'.join(map(str, sizes))}",
            "axis sizes must be products of divisors of the physical dimensions",
        )
    return best


def parts_of(axes: Sequence[tuple[str, int]], amounts: Amounts) -> tuple[Part, ...]:
    """Parts in physical order, outermost first; within a dimension earlier axes are outer."""
    parts = []
    for dim in range(len(amounts[0]) if amounts else 0):
        column = [row[dim] for row in amounts]
        for i, (name, _) in enumerate(axes):
            if column[i] > 1:
                parts.append(Part(name, dim, column[i], prod(column[i + 1 :])))
    return tuple(parts)


def explicit(
    topology: Topology, axes: Sequence[tuple[str, int]], layout: Mapping[str, Mapping[str, int]]
) -> tuple[Part, ...]:
    """Layout as the caller wants it: axis -> {physical dimension name: size of the part}."""
    names = [d.name for d in topology.links]
    for axis, wanted in layout.items():
        if axis not in dict(axes):
            raise MeshError("bad-layout", f"layout names an unknown axis {axis!r}")
        for dim in wanted:
            if dim not in names:
                raise MeshError(
                    "bad-layout", f"layout of {axis!r} names an unknown dimension {dim!r}",
                    f"{topology.name} has {', '.join(names)}",
                )  # fmt: skip
    amounts = tuple(tuple(layout.get(a, {}).get(n, 1) for n in names) for a, _ in axes)
    for (axis, size), row in zip(axes, amounts, strict=True):
        if prod(row) != size:
            given = f"{prod(row)} devices of {size}"
            raise MeshError("bad-layout", f"layout gives axis {axis!r} {given}")
    for i, physical in enumerate(topology.links):
        used = prod(row[i] for row in amounts)
        if used != physical.size:
            where = f"{physical.size} along {physical.name!r}"
            raise MeshError("bad-layout", f"layout uses {used} of {where}")
    return parts_of(axes, amounts)


def _badness(topology: Topology, axes: Sequence[tuple[str, int]], parts: Sequence[Part]) -> float:
    """Seconds per byte, summed over the axes, of a gather along each axis alone."""
    total = 0.0
    for name, size in axes:
        if size > 1:
            group = build_group(topology.links, parts, frozenset([name]), 0.0)
            total += 1 / _incoming(group.levels)
    return round(total, 18)  # equal layouts must compare equal whatever the summation order


def _incoming(levels: Sequence[Level]) -> float:
    """Rough bytes/s into one device: torus links add, anything else is its narrowest."""
    torus = [x.bytes_per_s * (2 if x.kind == "ring" else 1) for x in levels if x.kind in _TORUS]
    others = [x.bytes_per_s for x in levels if x.kind not in _TORUS]
    return sum(torus) if torus else min(others)


_TORUS = ("ring", "line")


def _order(parts: Sequence[Part], axes: Sequence[tuple[str, int]], dims: int) -> tuple[object, ...]:
    """Smaller is closer to row-major."""
    rank = {name: i for i, (name, _) in enumerate(axes)}
    return tuple(tuple((rank[p.axis], -p.size) for p in parts if p.dim == d) for d in range(dims))


def _row_major(sizes: Sequence[int], wanted: Sequence[int]) -> Amounts | None:
    """The row-major reshape, if no axis cuts across a dimension boundary unevenly."""
    amounts = [[1] * len(sizes) for _ in wanted]
    dim, left = len(sizes) - 1, sizes[-1]
    for i in reversed(range(len(wanted))):
        need = wanted[i]
        while need > 1:
            while left == 1 and dim > 0:
                dim, left = dim - 1, sizes[dim - 1]
            take = gcd(need, left)
            if take == 1 or (take != left and take != need):
                return None
            amounts[i][dim] *= take
            need, left = need // take, left // take
    return tuple(map(tuple, amounts))


def _amounts(sizes: Sequence[int], wanted: Sequence[int]) -> Iterator[Amounts]:
    """Every matrix of part sizes with the given products by row (axis) and column (dimension)."""
    if not wanted:
        if all(s == 1 for s in sizes):
            yield ()
        return
    for row in _rows(sizes, wanted[0]):
        rest = [s // r for s, r in zip(sizes, row, strict=True)]
        for tail in _amounts(rest, wanted[1:]):
            yield (row, *tail)


def _rows(sizes: Sequence[int], wanted: int) -> Iterator[tuple[int, ...]]:
    if not sizes:
        if wanted == 1:
            yield ()
        return
    for part in divisors(gcd(sizes[0], wanted)):
        for tail in _rows(sizes[1:], wanted // part):
            yield (part, *tail)


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _shape_text(axes: Sequence[tuple[str, int]]) -> str:
    return ", ".join(f"{name}={size}" for name, size in axes)
