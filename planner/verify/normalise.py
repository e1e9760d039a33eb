"""One form for collectives that move the same data: the closed list of equivalences.

Applied to predicted and compiled collectives alike, before they are compared:

1. all-reduce = reduce-scatter + all-gather of the same payload.
2. A matmul decomposed over a ring of n permutes (XLA's windowed einsum) = the all-gather or
   reduce-scatter that it replaces. For a gather it sends n - 1 shards, for a reduce-scatter
   n + 1: it sums up in both directions at once and brings the halves together at the end.
3. A gather over several mesh axes = gathers over one axis after the other, last axis first;
   a reduce-scatter the other way round.
4. Combined collectives = the sum of their payloads; counts are not compared.
5. An all-reduce of which every reader takes only its slice = a reduce-scatter.
6. An all-reduce of arrays that hold one device's slice each and else zeros = an all-gather.

Nothing else is equal: a reduction in f32 instead of bf16, a gather of something that is sliced
away afterwards, or another mesh axis is a difference.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Moved:
    """`total_bytes` per device and step: payload of one execution times executions."""

    kind: str
    axes: tuple[str, ...]
    total_bytes: float
    stands_for: str = ""  # the kind whose place it takes, for all-reduces and permutes


Totals = dict[tuple[str, tuple[str, ...]], float]


def normalised(moves: Iterable[Moved], sizes: Mapping[str, int]) -> Totals:
    """Bytes by (kind, axes) in the one form."""
    found: Totals = defaultdict(float)
    for move in moves:
        for part in _in_two_kinds(move, sizes):
            for kind, axes, total in _one_axis_each(part, sizes):
                found[kind, axes] += total
    return dict(found)


def _in_two_kinds(move: Moved, sizes: Mapping[str, int]) -> list[Moved]:
    """Reductions and decomposed matmuls as gathers and scatters."""
    if move.kind == "all-reduce" and move.stands_for:
        return [Moved(move.stands_for, move.axes, move.total_bytes)]
    if move.kind == "all-reduce":
        return [
            Moved(kind, move.axes, move.total_bytes) for kind in ("reduce-scatter", "all-gather")
        ]
    if move.kind == "collective-permute" and move.stands_for:
        n = prod(_size(axis, sizes) for axis in move.axes)
        sent = n - 1 if move.stands_for == "all-gather" else n + 1
        return [Moved(move.stands_for, move.axes, move.total_bytes * n / sent)]
    return [move]


def _one_axis_each(
    move: Moved, sizes: Mapping[str, int]
) -> list[tuple[str, tuple[str, ...], float]]:
    """A payload of b over (x, y): b over x, and b / |x| over y."""
    if move.kind not in ("all-gather", "reduce-scatter"):
        return [(move.kind, move.axes, move.total_bytes)]
    found: list[tuple[str, tuple[str, ...], float]] = []
    total = move.total_bytes
    for axis in move.axes:
        found.append((move.kind, (axis,), total))
        total /= _size(axis, sizes)
    return found


def _size(axis: str, sizes: Mapping[str, int]) -> int:
    """Size of a mesh axis, or of a part of one written 'y/2'."""
    name, _, part = axis.partition("/")
    return int(part) if part else sizes[name]


def raw(moves: Iterable[Moved]) -> Totals:
    """Bytes by (kind, axes) as they are."""
    found: Totals = defaultdict(float)
    for move in moves:
        found[move.kind, move.axes] += move.total_bytes
    return dict(found)
