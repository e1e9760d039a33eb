"""A logical mesh: named axes over the devices of a topology, and how they lie on its links."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod

import numpy as np

from meshes.chip import Chip
from meshes.errors import MeshError
from meshes.layout import assign, divisors, explicit
from meshes.links import Group, Part, build_group
from meshes.topology import Topology


@dataclass(frozen=True)
class LogicalMesh:
    """Named axes (name, size) in order; `parts` says which links each axis owns."""

    topology: Topology
    axes: tuple[tuple[str, int], ...]
    parts: tuple[Part, ...]
    _groups: dict[frozenset[str], Group] = field(
        default_factory=dict, compare=False, repr=False, hash=False
    )

    @property
    def chip(self) -> Chip:
        return self.topology.chip

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.axes)

    @property
    def devices(self) -> int:
        return self.topology.devices

    def size(self, axes: Iterable[str]) -> int:
        """Devices in a group along `axes` (1 for none); MeshError for an unknown axis."""
        sizes = dict(self.axes)
        return prod(sizes[self._known(a)] for a in set(axes))

    def group(self, axes: Iterable[str]) -> Group:
        """How the devices of one group along `axes` lie on the links; order does not matter."""
        key = frozenset(axes)
        if key not in self._groups:
            for axis in key:
                self._known(axis)
            links, start = self.topology.links, self.topology.start_s
            self._groups[key] = build_group(links, self.parts, key, start)
        return self._groups[key]

    def device_order(self) -> np.ndarray:
        """Physical device ids, shape [axis sizes]: the layout that prices hold for.

        Ids count row-major over the physical dimensions (on TPU x, y[, z][, core]); see
        Topology.coordinates.
        """
        ids = np.arange(self.devices).reshape([p.size for p in self.parts])
        order = [i for name in self.names for i, p in enumerate(self.parts) if p.axis == name]
        return ids.transpose(order).reshape([size for _, size in self.axes])

    def without(self, axis: str) -> LogicalMesh:
        """The other axes, on the links where they are."""
        axes = tuple((name, size) for name, size in self.axes if name != axis)
        return LogicalMesh(self.topology, axes, tuple(p for p in self.parts if p.axis != axis))

    def at_one_place(self, axis: str) -> LogicalMesh:
        """The devices at one position along `axis`, as a machine of their own: a smaller torus, or
        fewer nodes and devices of each. What is left of a ring is a line."""
        parts: list[Part] = []
        sizes = [1] * len(self.topology.links)
        for part in reversed(self.parts):
            if part.axis != axis:
                parts.append(replace(part, stride=sizes[part.dim]))
                sizes[part.dim] *= part.size
        links = []
        for link, size in zip(self.topology.links, sizes, strict=True):
            if link.kind == "core" and size != link.size:
                raise MeshError(
                    "bad-layout", f"axis {axis!r} divides the cores of a chip",
                    "a machine has whole chips: give the axis other dimensions in the layout",
                )  # fmt: skip
            kind = "line" if link.kind == "ring" and size != link.size else link.kind
            links.append(replace(link, size=size, kind=kind))
        family, _, _ = self.topology.name.partition(":")
        dims = "x".join(str(x.size) for x in links if x.kind != "core")
        topology = replace(self.topology, name=f"{family}:{dims}", links=tuple(links))
        return LogicalMesh(topology, self.without(axis).axes, tuple(reversed(parts)))

    def assignment(self) -> str:
        """One clause per axis: `x = dim x (32); y = dim y (32) × core (2)`."""
        return "; ".join(f"{name} = {self._owned(name)}" for name in self.names)

    def describe(self) -> str:
        shape = " × ".join(f"{name}={size}" for name, size in self.axes)
        return f"{self.topology.chips} chips, {self.devices} devices, mesh {shape}"

    def _owned(self, axis: str) -> str:
        return " × ".join(self._part_text(p) for p in self.parts if p.axis == axis) or "one device"

    def _part_text(self, part: Part) -> str:
        dim = self.topology.links[part.dim]
        if part.size == dim.size:
            return f"{dim.name} ({dim.size})"
        every = "" if part.stride == 1 else f", stride {part.stride}"
        return f"{dim.name} ({part.size} of {dim.size}{every})"

    def _known(self, axis: str) -> str:
        if axis not in self.names:
            raise MeshError(
                "unknown-axis", f"mesh has no axis {axis!r}", f"axes: {', '.join(self.names)}"
            )
        return axis


def logical(
    topology: Topology,
    shape: Mapping[str, int],
    layout: Mapping[str, Mapping[str, int]] | None = None,
) -> LogicalMesh:
    """Lay the axes of `shape` (name -> size, in order) over the devices of `topology`.

    The product of the sizes must be the number of devices. `layout` (axis -> physical
    dimension name -> size) overrides the search. Raises MeshError with suggestions.
    """
    axes = tuple((str(name), size) for name, size in shape.items())
    if not axes:
        raise MeshError("bad-shape", "a mesh needs at least one axis", _suggest(topology, 1))
    for name, size in axes:
        if not name.isidentifier():
            raise MeshError("bad-axis", f"axis name {name!r} is not an identifier")
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise MeshError("bad-shape", f"axis {name!r} has size {size!r}; it must be at least 1")
    count = prod(size for _, size in axes)
    if count != topology.devices:
        text = " × ".join(f"{name}={size}" for name, size in axes)
        raise MeshError(
            "bad-shape",
            f"shape {text} has {count} devices, {topology.name} has {topology.devices}",
            _suggest(topology, len(axes), tuple(name for name, _ in axes)),
        )
    parts = explicit(topology, axes, layout) if layout is not None else assign(topology, axes)
    return LogicalMesh(topology, axes, parts)


def candidate_shapes(topology: Topology) -> list[dict[str, int]]:
    """Natural one- and two-axis shapes, the most natural first; never empty.

    The second axis is a run of neighbours: whole inner dimensions, and possibly part of one
    more. Cuts between dimensions come first, then square ones; the one-axis shape comes last.
    """
    first, second = default_axes(topology)
    total = topology.devices
    natural: dict[int, bool] = {}  # size of the second axis -> cut between two dimensions
    inner = 1
    for dim in reversed(topology.links):
        for part in divisors(dim.size):
            whole = part == dim.size and dim.kind != "core"
            natural[inner * part] = natural.get(inner * part, False) or whole
        inner *= dim.size
    cuts = [n for n in natural if 1 < n < total]
    cuts.sort(key=lambda n: (not natural[n], max(n, total // n), n))
    return [*({first: total // n, second: n} for n in cuts), {first: total}]


def default_axes(topology: Topology) -> tuple[str, str]:
    """Axis names of automatic candidates."""
    torus = any(d.kind in ("ring", "line") for d in topology.links)
    return ("x", "y") if torus else ("data", "model")


def _suggest(topology: Topology, rank: int, names: tuple[str, ...] = ()) -> str:
    shapes = [s for s in candidate_shapes(topology) if len(s) == rank][:3]
    if not shapes:
        return f"sizes must multiply to {topology.devices}"
    names = names if len(names) == rank else tuple(shapes[0])
    texts = (
        ",".join(f"{n}={size}" for n, size in zip(names, s.values(), strict=True)) for s in shapes
    )
    return "try " + " or ".join(texts)
