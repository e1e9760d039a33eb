"""Seconds of one collective on an idle network, from how its group lies on the links.

Closed forms (S bytes as in `collective_seconds`, N devices in the group, W bytes/s into one
device, a seconds of latency):

    all-gather, reduce-scatter   a + S (N-1)/N / W
    all-reduce                   the two of them, one after the other
    all-to-all                   a + max over the cuts of bytes across the cut / its bandwidth
    collective-permute           a + S / (one link or port)

On a torus XLA runs one ring through all devices of a group, however many dimensions it spans: W
is two links. Only an all-reduce over whole dimensions takes the dimensions in turn, different
parts of the data in different orders, so that all links work: W adds up. Where that is faster,
a gather is an all-reduce of slices among zeros (see docs/hardware.md). Between nodes W is the
narrower of the node's bus and the ports of the members of one node (a ring through all of them,
as NCCL builds it). The cut of a ring of n is S n / 4 bytes over two links, of a line over one.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import numpy as np
from numpy.typing import ArrayLike

from meshes import Group, Level, LogicalMesh

_TORUS = ("ring", "line")


def collective_seconds(
    mesh: LogicalMesh, kind: str, axes: Iterable[str], payload_bytes: ArrayLike
) -> float | np.ndarray:
    """Time of one `kind` over `axes`; vectorised over `payload_bytes`.

    `payload_bytes` is the full payload on one device: the all-gather result, the
    reduce-scatter, all-reduce, all-to-all or permute operand. A permute over one axis is a
    shift to the neighbour, over several an arbitrary exchange, as heavy as an all-to-all;
    `shift` is a permute between neighbours over any axes.
    Zero for a group of one device and for `slice`, which moves nothing. Raises ValueError for
    an unknown kind or negative bytes, MeshError for an unknown axis.
    """
    names = frozenset(axes)
    group = mesh.group(names)
    size = np.asarray(payload_bytes, dtype=float)
    if np.any(size < 0) or not np.all(np.isfinite(size)):
        raise ValueError(f"payload_bytes must be finite and not negative, got {payload_bytes!r}")
    seconds = _seconds(kind, group, size, shift=kind == "shift" or len(names) == 1)
    return float(seconds) if seconds.ndim == 0 else seconds


def _seconds(kind: str, group: Group, size: np.ndarray, *, shift: bool) -> np.ndarray:
    if kind not in _KINDS:
        raise ValueError(f"unknown collective {kind!r}; known: {', '.join(_KINDS)}")
    if kind == "slice" or group.size == 1:
        return np.zeros_like(size)
    if kind in ("all-gather", "reduce-scatter", "all-reduce"):
        ring = _ring(group, size)
        turns = _turns(group, size)
        if kind == "all-reduce":
            return np.minimum(2 * ring, turns)
        return np.minimum(ring, turns)
    if kind == "all-to-all":
        return _latency(group) + size * _exchange_s_per_byte(group)
    return _permute(group, size, shift=shift)


_KINDS = (
    "all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute", "shift",
    "slice",
)  # fmt: skip


def _latency(group: Group) -> float:
    return group.start_s + sum(level.latency_s for level in group.levels)


def _ring(group: Group, size: np.ndarray) -> np.ndarray:
    """All-gather by one ring through all devices: each takes in all but its own part."""
    torus = group.of_kind(*_TORUS)
    share = size * (group.size - 1) / group.size
    if len(torus) < 2:
        return _latency(group) + share / _incoming(group)
    # A ring that turns at the ends of rows needs no wraparound, and passes every device.
    hops = prod(level.size for level in torus) // 2 * max(level.hop_s for level in torus)
    return group.start_s + hops + share / (2 * min(level.bytes_per_s for level in torus))


def _turns(group: Group, size: np.ndarray) -> np.ndarray:
    """All-reduce by one dimension after the other, different parts of the data in turn."""
    if len(group.of_kind(*_TORUS)) < 2 or not group.whole:
        return np.full_like(size, np.inf)
    return 2 * (_latency(group) + size * _all_links_s_per_byte(group))


def _all_links_s_per_byte(group: Group) -> float:
    """Every device takes in all but its own part of the payload; a slow dimension holds up all."""
    incoming = (group.size - 1) / group.size / _incoming(group)
    return max([incoming, *_plane_cuts(group)])


def _plane_cuts(group: Group) -> list[float]:
    """Seconds per byte into one plane of the torus across each dimension, by all its links.

    A plane lacks what the other n - 1 of n planes hold, and takes it in once. Where all links
    are alike, what every device takes in is the tighter bound.
    """
    torus = group.of_kind(*_TORUS)
    positions = prod(level.size for level in torus)
    return [
        (level.size - 1) / (positions * _links(level) * level.bytes_per_s) for level in torus
    ]


def _incoming(group: Group) -> float:
    """Bytes per second into one device when data comes over all links of the group."""
    widths = []
    torus = group.of_kind(*_TORUS)
    if torus:
        widths.append(sum(_links(level) * level.bytes_per_s for level in torus))
    # Cores of a chip in the ring pass on what the links bring: never slower than the links.
    widths += [level.bytes_per_s for level in group.of_kind("core") if not torus]
    widths += [level.bytes_per_s for level in group.of_kind("switch")]
    # The rings leave a node or pod once per member in it, each through a port of its own.
    inner = _members_inside(group)
    widths += [inner * level.bytes_per_s for level in group.of_kind("network")]
    return min(widths)


def _links(level: Level) -> int:
    return 2 if level.kind == "ring" else 1


def _members_inside(group: Group) -> int:
    """Members of the group in one node or pod."""
    return prod(level.size for level in group.levels if level.kind != "network")


def _exchange_s_per_byte(group: Group) -> float:
    """All-to-all of one byte per device: the slowest cut through the group."""
    cuts = [_torus_cut(group, level) for level in group.of_kind(*_TORUS)]
    inner = _members_inside(group)
    for level in group.of_kind("core", "switch"):
        cuts.append((level.size - 1) / level.size / level.point_to_point_bytes_per_s)
    for level in group.of_kind("network"):
        outside = (group.size - inner) / group.size
        cuts.append(outside / level.point_to_point_bytes_per_s)
    return max(cuts)


def _torus_cut(group: Group, level: Level) -> float:
    """Seconds per byte across the middle of one torus dimension.

    Each of the devices that share a chip sends; halves of a and b of n positions exchange
    a b / n of what a position holds, over one link of a line or two of a ring.
    """
    n = level.size
    cores = prod(other.size for other in group.of_kind("core"))
    crossing = (n // 2) * (n - n // 2) / n
    return cores * crossing / (_links(level) * level.bytes_per_s)


def _permute(group: Group, size: np.ndarray, *, shift: bool) -> np.ndarray:
    """Neighbour shift along one axis, or any permutation inside a group of several axes."""
    slowest = min(level.point_to_point_bytes_per_s for level in group.levels)
    one_link = 1 / slowest
    if shift:
        return group.start_s + max(level.hop_s for level in group.levels) + size * one_link
    return _latency(group) + size * max(one_link, _exchange_s_per_byte(group))
