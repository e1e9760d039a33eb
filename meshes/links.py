"""How the devices of one group lie on the links, and what share of the links the group gets.

All groups along the same axes communicate at the same time, so a link that several groups
cross is divided between them:

* the two cores of a chip, in different groups, each get half of every link of the chip;
* a group that takes every k-th chip of a torus dimension shares its links with k - 1 others;
* a group of neighbours that is not the whole dimension has its links to itself, but no
  wraparound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

from meshes.topology import Curve, Dimension


@dataclass(frozen=True)
class Part:
    """A piece of a physical dimension that a logical axis owns.

    `stride` is the product of the pieces of the same dimension inside (more minor than) it.
    """

    axis: str
    dim: int
    size: int
    stride: int


@dataclass(frozen=True)
class Level:
    """One physical dimension as one group sees it.

    size: members of the group along it. kind: as Dimension.kind; a ring of which the group
    holds only a run of neighbours is a line.
    bytes_per_s: what the group gets, in one direction: of each link (ring, line), between
    cores (core), of the bus bandwidth (switch), of one device's port (network).
    point_to_point_bytes_per_s: the same for one sender and one receiver.
    latency_s: of one traversal, half an all-reduce, beyond Group.start_s.
    hop_s: to the next member.
    """

    name: str
    kind: str
    size: int
    bytes_per_s: float
    point_to_point_bytes_per_s: float
    latency_s: float
    hop_s: float


@dataclass(frozen=True)
class Group:
    """The devices that differ only along some axes: `size` of them on `levels`.

    `levels` run from the outermost dimension to the innermost; dimensions along which the
    group has one member are left out. `start_s` is paid once by every collective. `whole`: the
    group has all devices of each dimension that it reaches, and of each of its chips.
    """

    size: int
    levels: tuple[Level, ...]
    start_s: float
    whole: bool

    def of_kind(self, *kinds: str) -> tuple[Level, ...]:
        return tuple(level for level in self.levels if level.kind in kinds)


def build_group(
    links: Sequence[Dimension], parts: Sequence[Part], axes: frozenset[str], start_s: float
) -> Group:
    """Group of `axes` for devices laid out as `parts` say."""
    sharing = _cores_outside(links, parts, axes)
    levels = []
    whole = sharing == 1
    for i, dim in enumerate(links):
        here = [p for p in parts if p.dim == i]
        inside = [p for p in here if p.axis in axes]
        if prod(p.size for p in inside) > 1:
            levels.append(_level(dim, here, inside, sharing))
            whole = whole and levels[-1].size == dim.size
    return Group(prod(level.size for level in levels), tuple(levels), start_s, whole)


def _cores_outside(links: Sequence[Dimension], parts: Sequence[Part], axes: frozenset[str]) -> int:
    """How many groups one chip belongs to: cores that are not together in one group."""
    return prod(p.size for p in parts if links[p.dim].kind == "core" and p.axis not in axes)


def _level(dim: Dimension, here: list[Part], inside: list[Part], sharing: int) -> Level:
    size = prod(p.size for p in inside)
    if dim.kind in ("ring", "line"):
        return _torus_level(dim, here, inside, size, sharing)
    if dim.kind == "switch":
        curve = dim.curve if _neighbours(inside) else dim.apart or dim.curve
        latency, bandwidth = interpolate(curve, size)
        return Level(
            dim.name, "switch", size, bandwidth, dim.bytes_per_s, latency / 2, dim.latency_s
        )
    if dim.kind == "network":
        # Tree depth grows by one per doubling; half of it for each half of an all-reduce.
        latency = dim.latency_s * (size - 1).bit_length() / 2
        rate, hop = dim.bytes_per_s, dim.latency_s / 2
        return Level(dim.name, "network", size, rate, rate, latency, hop)
    rate, hop = dim.bytes_per_s, dim.latency_s
    return Level(dim.name, "core", size, rate, rate, hop, hop)


def _neighbours(inside: list[Part]) -> bool:
    """Whether the members along a dimension are a run without gaps."""
    span = max(p.size * p.stride for p in inside if p.size > 1)
    return span == prod(p.size for p in inside)


def _torus_level(
    dim: Dimension, here: list[Part], inside: list[Part], size: int, sharing: int
) -> Level:
    """Ring or line: bandwidth after sharing, and the hops from end to end."""
    outermost = max(inside, key=lambda p: p.stride)
    span = outermost.size * outermost.stride
    interleaved = prod(p.size for p in here if p.stride < outermost.stride and p not in inside)
    whole = span == dim.size
    kind = "ring" if dim.kind == "ring" and whole else "line"
    hops = span // 2 if kind == "ring" else span - outermost.stride
    bandwidth = dim.bytes_per_s / (sharing * interleaved)
    hop = min(p.stride for p in inside) * dim.latency_s
    return Level(dim.name, kind, size, bandwidth, bandwidth, hops * dim.latency_s, hop)


def interpolate(curve: Curve, size: int) -> tuple[float, float]:
    """(latency_s, bytes_per_s) for a group of `size`: linear between entries, flat outside."""
    if size <= curve[0][0]:
        return curve[0][1:]
    for (n0, a0, b0), (n1, a1, b1) in pairwise(curve):
        if size <= n1:
            t = (size - n0) / (n1 - n0)
            return a0 + t * (a1 - a0), b0 + t * (b1 - b0)
    return curve[-1][1:]
