"""From one spec to another: the cheapest sequence of collectives.

A resharding is a shortest path over specs; the moves are all-gather, all-to-all,
reduce-scatter, all-reduce, a permutation of blocks, and the free local slice and mask. Lowering
executes the path, the ILP pays its price: one function serves both.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

from planner.sharding.spec import Sizes, Spec

# Prices a move: (kind, axes, payload bytes) → seconds.
Pricer = Callable[[str, tuple[str, ...], float], float]

FREE = ("slice", "mask")
MOVE_EPSILON_S = 1e-12  # a free move still counts, so that paths have no pointless ones


@dataclass(frozen=True)
class Move:
    """One collective of a path: its result spec, and what to move (see Collective)."""

    kind: str
    axes: tuple[str, ...]
    result: Spec
    dim: int = -1
    to_dim: int = -1
    order: tuple[str, ...] = ()


def payload_elements(move: Move, source: Spec, shape: Sequence[int], sizes: Sizes) -> int:
    """Elements of the payload on one device: the result of a gather, else the operand."""
    spec = move.result if move.kind == "all-gather" else source
    return prod(spec.local_shape(shape, sizes))


@dataclass
class Resharder:
    """Finds and prices paths on one mesh; results are cached by (shape, itemsize, specs)."""

    sizes: Sizes
    price: Pricer

    def __post_init__(self) -> None:
        self._paths: dict[tuple[Spec, Spec, tuple[int, ...], int], tuple[Move, ...] | None] = {}
        self._seconds: dict[tuple[Spec, Spec, tuple[int, ...], int], float] = {}

    def path(
        self, source: Spec, target: Spec, shape: tuple[int, ...], itemsize: int,
        reduce: str = "sum",
    ) -> tuple[Move, ...] | None:
        """Moves that turn `source` into `target`, or None if there is no way: a shard cannot
        become an unreduced sum, nor can an unreduced maximum (`reduce`)."""
        if _mixes(source, target, reduce):
            return None
        if source == target:
            return ()
        key = (source, target, shape, itemsize)
        if key not in self._paths:
            self._paths[key] = self._search(source, target, shape, itemsize)
        return self._paths[key]

    def seconds(
        self, source: Spec, target: Spec, shape: tuple[int, ...], itemsize: int,
        reduce: str = "sum",
    ) -> float:
        """Time of the path on an idle network; inf if there is none."""
        if _mixes(source, target, reduce):
            return float("inf")
        if source == target:
            return 0.0
        key = (source, target, shape, itemsize)
        found = self._seconds.get(key)
        if found is None:
            path = self.path(source, target, shape, itemsize)
            found = float("inf") if path is None else self._total(path, source, shape, itemsize)
            self._seconds[key] = found
        return found

    def extra_bytes(
        self, source: Spec, target: Spec, shape: tuple[int, ...], itemsize: int
    ) -> tuple[int, int]:
        """(bytes of intermediate buffers, bytes of the result); (0, 0) without conversion."""
        path = self.path(source, target, shape, itemsize)
        if not path:
            return 0, 0
        local = [prod(m.result.local_shape(shape, self.sizes)) * itemsize for m in path]
        return sum(local[:-1]), local[-1]

    def _total(
        self, path: Sequence[Move], source: Spec, shape: tuple[int, ...], itemsize: int
    ) -> float:
        total = 0.0
        for move in path:
            if move.kind not in FREE:
                payload = payload_elements(move, source, shape, self.sizes) * itemsize
                total += self.price(move.kind, move.axes, payload)
            source = move.result
        return total

    def _search(
        self, source: Spec, target: Spec, shape: tuple[int, ...], itemsize: int
    ) -> tuple[Move, ...] | None:
        """Dijkstra over specs; ties are broken by discovery order, so it is deterministic."""
        if any(a in source.axes for a in target.partial):
            return None
        best: dict[Spec, float] = {source: 0.0}
        queue: list[tuple[float, int, Spec, tuple[Move, ...]]] = [(0.0, 0, source, ())]
        count = 0
        while queue:
            seconds, _, spec, path = heapq.heappop(queue)
            if spec == target:
                return path
            if seconds > best[spec]:
                continue
            for move in self._moves(spec, target):
                if not move.result.fits(shape, self.sizes):
                    continue
                payload = payload_elements(move, spec, shape, self.sizes) * itemsize
                cost = MOVE_EPSILON_S
                if move.kind not in FREE:
                    cost += self.price(move.kind, move.axes, payload)
                total = seconds + cost
                if total < best.get(move.result, float("inf")):
                    best[move.result] = total
                    count += 1
                    heapq.heappush(queue, (total, count, move.result, (*path, move)))
        return None

    def _moves(self, spec: Spec, target: Spec) -> Iterator[Move]:
        """Moves from `spec` that can lie on a good path to `target`: axes are only removed, or
        added where the target has them."""
        placed = {a: d for d, axes in enumerate(target.dims) for a in axes}
        yield from _reductions(spec, target, placed)
        for d, axes in enumerate(spec.dims):
            yield from _removals(spec, target, d, axes, placed)
            for order in _orders(axes, target.dims[d]):
                yield Move("collective-permute", axes, _with(spec, {d: order}), d, order=order)
        used = {*spec.axes, *spec.partial}
        for axis, d in placed.items():
            if axis not in used:
                yield Move("slice", (axis,), _with(spec, {d: (*spec.dims[d], axis)}), d)
        for axis in target.partial:
            if axis not in used:
                partial = tuple(a for a in self.sizes if a in {*spec.partial, axis})
                yield Move("mask", (axis,), Spec(spec.dims, partial))


def _mixes(source: Spec, target: Spec, reduce: str) -> bool:
    """Whether the reader would add up what has to be combined in another way."""
    return reduce != "sum" and any(a in target.partial for a in source.partial)


def _with(
    spec: Spec, dims: dict[int, tuple[str, ...]], partial: Sequence[str] | None = None
) -> Spec:
    changed = tuple(dims.get(i, d) for i, d in enumerate(spec.dims))
    return Spec(changed, spec.partial if partial is None else tuple(partial))


def _reductions(spec: Spec, target: Spec, placed: dict[str, int]) -> Iterator[Move]:
    pending = tuple(a for a in spec.partial if a not in target.partial)
    for axis in pending:
        rest = [a for a in spec.partial if a != axis]
        if axis in placed:
            d = placed[axis]
            yield Move(
                "reduce-scatter", (axis,), _with(spec, {d: (*spec.dims[d], axis)}, rest), d
            )
        if len(pending) > 1:
            yield Move("all-reduce", (axis,), _with(spec, {}, rest))
    if pending:
        rest = [a for a in spec.partial if a in target.partial]
        yield Move("all-reduce", pending, _with(spec, {}, rest))
    together: dict[int, list[str]] = {}
    for axis in pending:
        if axis in placed:
            together.setdefault(placed[axis], []).append(axis)
    for d, axes in together.items():
        if len(axes) > 1:
            rest = [a for a in spec.partial if a not in axes]
            grown = _with(spec, {d: (*spec.dims[d], *axes)}, rest)
            yield Move("reduce-scatter", tuple(axes), grown, d)


def _removals(
    spec: Spec, target: Spec, d: int, axes: tuple[str, ...], placed: dict[str, int]
) -> Iterator[Move]:
    """Gather the last axes of dimension d, or send them to the dimension that wants them."""
    for k in range(1, len(axes) + 1):
        tail, rest = axes[-k:], axes[:-k]
        yield Move("all-gather", tail, _with(spec, {d: rest}), d)
        goals = {placed.get(a, d) for a in tail}
        if len(goals) == 1:
            to = goals.pop()
            if to != d:
                moved = _with(spec, {d: rest, to: (*spec.dims[to], *tail)})
                yield Move("all-to-all", tail, moved, d, to)


def _orders(axes: tuple[str, ...], wanted: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Useful reorderings of one dimension's axes: those to keep first, in the target's order."""
    if len(axes) < 2:
        return
    keep = tuple(a for a in wanted if a in axes)
    order = (*keep, *(a for a in axes if a not in keep))
    if order != axes:
        yield order
