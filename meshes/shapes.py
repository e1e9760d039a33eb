"""Every logical mesh of a topology up to a number of axes, those that price alike only once.

The order of the axes matters: it decides how they lie on the links (see `layout`), and which of
two axes is the outer one where both split a dimension. Two meshes price alike if their groups of
devices, for every set of axes in this order, lie on links of the same kinds and speeds, whatever
the axes and dimensions are called.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from itertools import combinations

from meshes.errors import MeshError
from meshes.layout import divisors
from meshes.links import Group
from meshes.mesh import LogicalMesh, candidate_shapes, default_axes, logical
from meshes.topology import Topology

MOST_AXES = 3
LAST_AXIS = {"x": "z", "data": "extra"}  # third axis by the first one's name


def every_mesh(topology: Topology, most: int = MOST_AXES) -> list[LogicalMesh]:
    """Meshes of one to `most` axes (at most three): natural ones first, then by number of axes;
    never empty."""
    found: dict[object, LogicalMesh] = {}
    for shape in _shapes(topology, most):
        try:
            mesh = logical(topology, shape)
        except MeshError:  # these sizes cannot be laid on the links
            continue
        found.setdefault(alike(mesh), mesh)
    return list(found.values())


def _shapes(topology: Topology, most: int) -> Iterator[dict[str, int]]:
    yield from (s for s in candidate_shapes(topology) if len(s) <= most)
    for rank in range(1, most + 1):
        for sizes in _factorisations(topology.devices, rank):
            yield dict(zip(axis_names(topology), sizes, strict=False))


def axis_names(topology: Topology) -> tuple[str, str, str]:
    first, second = default_axes(topology)
    return first, second, LAST_AXIS[first]


def _factorisations(devices: int, rank: int) -> Iterator[tuple[int, ...]]:
    """Ordered sizes above one with product `devices`; one axis may have a single device."""
    if rank == 1:
        yield (devices,)
        return
    for size in divisors(devices)[1:-1]:
        for rest in _factorisations(devices // size, rank - 1):
            if 1 not in rest:
                yield (size, *rest)


def alike(mesh: LogicalMesh) -> Hashable:
    """Equal for meshes that differ only in what axes and dimensions are called."""
    names = mesh.names
    subsets = (s for n in range(1, len(names) + 1) for s in combinations(names, n))
    return tuple(_links(mesh.group(s)) for s in subsets)


def _links(group: Group) -> tuple[object, ...]:
    levels = (
        (x.kind, x.size, x.bytes_per_s, x.point_to_point_bytes_per_s, x.latency_s, x.hop_s)
        for x in group.levels
    )
    return group.size, tuple(sorted(levels))
