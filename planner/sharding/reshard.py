"""From one spec to another: the cheapest sequence of collectives.

A resharding is a shortest path over specs; the moves are all-gather, all-to-all,
reduce-scatter, all-reduce, a permutation of blocks, and the free local slice and mask. Lowering
executes the path, the ILP pays its price: one table of distances serves both.

Paths undo nothing, as compilers never do: what stays split is not joined on the way, what is cut
stays cut, and only sums that the source has pending are reduced. A detour by way of collectives
over more axes can be faster, where these lie better on the links, but no program could ask for it.

Prices depend on a tensor only through its bytes and on which specs divide it, so tensors of
equal rank, size and divisibility share one table. Unevenly split ones have tables of their own:
their payloads are padded, and blocks can be joined or cut only where the padding permits it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import permutations
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.sharding.spec import Sizes, Spec

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
# Prices a move: (kind, axes, payload bytes of many moves) → seconds of each.
Pricer = Callable[[str, tuple[str, ...], Floats], Any]
# Prices what follows gathers: (rank, dimension, axes, width of shards, payload bytes) → seconds.
Copier = Callable[[int, int, tuple[str, ...], Ints, Floats], Any]

FREE = ("slice", "mask")
MOVE_EPSILON_S = 1e-15  # a free move still counts, so that paths have no pointless ones
CHUNK_CELLS = 1_000_000  # moves × sources relaxed at a time: 8 MB, so that they stay in cache


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
    """Elements of the payload on one device: the result of a gather, else the operand. A
    dimension that is cut is padded first, one that is joined is cut to its size afterwards."""
    before, after = source.local_shape(shape, sizes), move.result.local_shape(shape, sizes)
    if move.kind == "all-gather":
        return prod(before) * prod(sizes[a] for a in move.axes)
    if move.kind == "reduce-scatter":
        return prod(after) * prod(sizes[a] for a in move.axes)
    if move.kind == "all-to-all":
        kept = prod(n for d, n in enumerate(before) if d != move.to_dim)
        return kept * after[move.to_dim] * prod(sizes[a] for a in move.axes)
    return prod(before)


@dataclass
class SpecGraph:
    """Every spec of tensors of one rank (axes in any order within a dimension) and every move.
    `uneven`: those too that only uneven dimensions need."""

    rank: int
    sizes: Sizes
    uneven: bool = False
    specs: list[Spec] = field(init=False)
    number: dict[Spec, int] = field(init=False)

    def __post_init__(self) -> None:
        self.specs = list(_ordered_specs(self.rank, self.sizes))
        self.number = {spec: i for i, spec in enumerate(self.specs)}

    @cached_property
    def moves(self) -> list[tuple[int, int, Move]]:
        """(source, target, move), sorted by target; of parallel moves all are kept."""
        found = [
            (u, self.number[move.result], move)
            for u, spec in enumerate(self.specs)
            for move in _moves(spec, self.sizes, self.uneven)
        ]
        return sorted(found, key=lambda edge: (edge[1], edge[0]))

    @cached_property
    def arrays(self) -> tuple[Ints, Ints]:
        """Sources and targets of the moves."""
        sources = np.array([u for u, _, _ in self.moves], dtype=np.int64)
        targets = np.array([v for _, v, _ in self.moves], dtype=np.int64)
        return sources, targets

    @cached_property
    def places(self) -> tuple[Ints, Ints]:
        """Of every spec, as sets of bits: which axis splits which dimension or is pending, and
        the same with pending axes in all dimensions, where paths may scatter and join them."""
        found = np.zeros((2, len(self.specs)), dtype=np.int64)
        for i, spec in enumerate(self.specs):
            for d, axes in enumerate(spec.dims):
                found[:, i] |= self._bits(axes, d)
            found[0, i] |= self._bits(spec.partial, -1)
            for d in range(-1, self.rank):
                found[1, i] |= self._bits(spec.partial, d)
        return found[0], found[1]

    @cached_property
    def needed(self) -> Ints:
        """Of every move the bits that a path's source must have: no path joins or reduces what it
        has cut or masked itself."""
        found = np.zeros(len(self.moves), dtype=np.int64)
        for e, (_, _, move) in enumerate(self.moves):
            if move.kind in ("all-gather", "all-to-all"):
                found[e] = self._bits(move.axes, move.dim)
            elif move.kind in ("all-reduce", "reduce-scatter"):
                found[e] = self._bits(move.axes, -1)
        return found

    def barred(self, padded: NDArray[np.bool_]) -> Ints:
        """Of every move the bits that a path's source must not have: what is split already is not
        joined and cut again, but for dimensions with padding, whose blocks need not nest."""
        found = np.zeros(len(self.moves), dtype=np.int64)
        for e, (_, _, move) in enumerate(self.moves):
            if move.kind in FREE and (move.dim < 0 or not padded[move.dim]):
                found[e] = self._bits(move.axes, move.dim)
        return found

    def _bits(self, axes: Sequence[str], dim: int) -> int:
        """Bits of `axes` in dimension `dim`, −1 for pending sums."""
        names = list(self.sizes)
        return sum(1 << (names.index(a) * (self.rank + 1) + dim + 1) for a in axes)

    @cached_property
    def parts(self) -> Ints:
        """Of every spec the shards of every dimension."""
        found = [[prod(self.sizes[a] for a in d) for d in spec.dims] for spec in self.specs]
        return np.array(found, dtype=np.int64).reshape(len(self.specs), self.rank)

    def local_elements(self, shape: Sequence[int]) -> Floats:
        """Of every spec the elements of one shard."""
        local = -(-np.array(shape, dtype=np.int64) // self.parts)
        return local.prod(axis=1).astype(float)

    def payloads(self, shape: Sequence[int]) -> Floats:
        """`payload_elements` of every move."""
        u, v = self.arrays
        local = -(-np.array(shape, dtype=np.int64) // self.parts)
        elements = self.local_elements(shape)
        found = elements[u]
        for (kind, axes), edges in self.alike.items():
            group = prod(self.sizes[a] for a in axes)
            if kind == "all-gather":
                found[edges] *= group
            elif kind == "reduce-scatter":
                found[edges] = elements[v[edges]] * group
            elif kind == "all-to-all":
                to = self.ends[1][edges]
                cut, whole = local[v[edges], to], local[u[edges], to]
                found[edges] = found[edges] / whole * cut * group
        return found

    @cached_property
    def ends(self) -> tuple[Ints, Ints]:
        """`dim` and `to_dim` of every move."""
        dims = np.array([(m.dim, m.to_dim) for _, _, m in self.moves], dtype=np.int64)
        dims = dims.reshape(len(self.moves), 2)
        return dims[:, 0], dims[:, 1]

    def aligned(self, shape: Sequence[int]) -> NDArray[np.bool_]:
        """Of every move whether blocks are joined to blocks and cut into blocks: always, if the
        dimension divides. Padding inside a dimension that stays split is in the way."""
        u, v = self.arrays
        rows = np.arange(len(u))
        found = np.ones(len(u), dtype=bool)
        for dims in self.ends:
            changed = rows[dims >= 0]
            d = dims[changed]
            few = np.minimum(self.parts[u[changed], d], self.parts[v[changed], d])
            many = np.maximum(self.parts[u[changed], d], self.parts[v[changed], d])
            size = np.array(shape, dtype=np.int64)[d]
            joined = -(-size // many) * (many // few)
            found[changed] &= (few == 1) | (joined == -(-size // few))
        return found

    @cached_property
    def alike(self) -> dict[tuple[str, tuple[str, ...]], Ints]:
        """Moves grouped by what their price depends on besides the payload."""
        groups: dict[tuple[str, tuple[str, ...]], list[int]] = {}
        for e, (_, _, move) in enumerate(self.moves):
            groups.setdefault((move.kind, move.axes), []).append(e)
        return {key: np.array(edges, dtype=np.int64) for key, edges in groups.items()}


@dataclass
class Distances:
    """Shortest paths between all specs for tensors of one size, found row by row as needed."""

    graph: SpecGraph
    weights: Floats  # of every move; inf where a spec does not divide the tensor
    barred: Ints  # of every move: what its path's source must not have
    rows: dict[int, Floats] = field(default_factory=dict)
    paths: dict[tuple[int, int], tuple[Move, ...] | None] = field(default_factory=dict)

    def table(self, sources: Sequence[int], targets: Sequence[int]) -> Floats:
        """Seconds (plus an epsilon a move) from every source to every target."""
        missing = list(dict.fromkeys(s for s in sources if s not in self.rows))
        if missing:
            self._relax(missing)
        return np.stack([self.rows[s] for s in sources])[:, list(targets)]

    def _relax(self, missing: Sequence[int]) -> None:
        """Bellman-Ford from many sources at once; moves are sorted by target."""
        u, v = self.graph.arrays
        usable = np.flatnonzero(np.isfinite(self.weights))
        u, v = u[usable], v[usable]
        starts = np.flatnonzero(np.diff(v, prepend=-1))
        ends = v[starts]
        chunk = max(1, CHUNK_CELLS // max(1, len(u)))
        for at in range(0, len(missing), chunk):
            part = missing[at : at + chunk]
            w = self._weights_from(part, usable)
            d = np.full((len(self.graph.specs), len(part)), np.inf)  # a column per source
            d[part, np.arange(len(part))] = 0.0
            while len(u):
                reached = np.minimum.reduceat(d[u] + w, starts, axis=0)
                before = d[ends]
                if not (reached < before).any():
                    break
                d[ends] = np.minimum(before, reached)
            self.rows.update(zip(part, np.ascontiguousarray(d.T), strict=True))

    def _weights_from(self, sources: Sequence[int], moves: Ints | slice) -> Floats:
        """A row per move, a column per source: inf where it would undo what the source has."""
        here, joinable = (bits[list(sources)] for bits in self.graph.places)
        needed, barred = self.graph.needed[moves, None], self.barred[moves, None]
        undone = (needed & ~joinable) | (barred & here)
        return np.where(undone == 0, self.weights[moves, None], np.inf)

    def last(self, source: int) -> Ints:
        """By which move the paths of `path` end at every spec: its number, or the number of moves
        where there is no path, and at the source itself."""
        if source not in self.rows:
            self._relax([source])
        row = self.rows[source]
        u, v = self.graph.arrays
        found = np.full(len(row), len(v), dtype=np.int64)
        if not len(v):
            return found
        into = row[u] + self._weights_from([source], slice(None))[:, 0]
        starts = np.flatnonzero(np.diff(v, prepend=-1))
        least = np.minimum.reduceat(into, starts)
        attained = into == np.repeat(least, np.diff([*starts, len(v)]))
        numbers = np.where(attained, np.arange(len(v)), len(v))
        found[v[starts]] = np.minimum.reduceat(numbers, starts)
        found[~np.isfinite(row)] = len(v)
        found[source] = len(v)
        return found

    def path(self, source: int, target: int) -> tuple[Move, ...] | None:
        """The moves of a shortest path; of equal ones always the same."""
        if (source, target) not in self.paths:
            self.paths[source, target] = self._trace(source, target)
        return self.paths[source, target]

    def _trace(self, source: int, target: int) -> tuple[Move, ...] | None:
        """Backwards from the target, along moves that attain the distances."""
        if source not in self.rows:
            self._relax([source])
        row = self.rows[source]
        if not np.isfinite(row[target]):
            return None
        u, v = self.graph.arrays
        weights = self._weights_from([source], slice(None))[:, 0]
        found: list[Move] = []
        while target != source:
            low, high = np.searchsorted(v, [target, target + 1])
            into = row[u[low:high]] + weights[low:high]
            best = low + int(np.argmin(into))
            found.append(self.graph.moves[best][2])
            target = int(u[best])
        return tuple(reversed(found))


@dataclass
class Resharder:
    """Finds and prices paths on one mesh; `uneven`: also of tensors that do not divide. `copy`:
    what copying costs that follows some gathers."""

    sizes: Sizes
    price: Pricer
    uneven: bool = False
    copy: Copier | None = None

    def __post_init__(self) -> None:
        # Axes of size 1 split nothing.
        self.splitting = {a: n for a, n in self.sizes.items() if n > 1}
        self._graphs: dict[int, SpecGraph] = {}
        self._distances: dict[tuple[Any, ...], Distances] = {}
        self._fits: dict[tuple[int, ...], NDArray[np.bool_]] = {}
        self._copying: dict[tuple[tuple[int, ...], int], Floats] = {}
        self._known: dict[tuple[tuple[int, ...], int], tuple[SpecGraph, Distances]] = {}

    def matrix(
        self, sources: Sequence[Spec], targets: Sequence[Spec], shape: tuple[int, ...],
        itemsize: int, reduce: str = "sum",
    ) -> Floats:  # fmt: skip
        """Seconds of the paths between specs on an idle network; inf where there is none."""
        graph, distances = self._of(shape, itemsize)
        table = distances.table(
            [graph.number[s] for s in sources], [graph.number[t] for t in targets]
        )
        seconds = np.where(table < MOVE_EPSILON_S * 100, 0.0, table)
        if reduce != "sum":
            mixed = [[_mixes(s, t, reduce) for t in targets] for s in sources]
            seconds[np.array(mixed)] = np.inf
        return seconds

    def seconds(
        self, source: Spec, target: Spec, shape: tuple[int, ...], itemsize: int,
        reduce: str = "sum",
    ) -> float:  # fmt: skip
        """Time of the path on an idle network; inf if there is none."""
        return float(self.matrix([source], [target], shape, itemsize, reduce)[0, 0])

    def path(
        self, source: Spec, target: Spec, shape: tuple[int, ...], itemsize: int,
        reduce: str = "sum",
    ) -> tuple[Move, ...] | None:  # fmt: skip
        """Moves that turn `source` into `target`, or None if there is no way: partial results
        of another kind than sums (`reduce`) cannot become an unreduced sum."""
        if _mixes(source, target, reduce):
            return None
        if source == target:
            return ()
        graph, distances = self._of(shape, itemsize)
        return distances.path(graph.number[source], graph.number[target])

    def between_bytes(
        self, sources: Sequence[Spec], targets: Sequence[Spec], shape: tuple[int, ...],
        itemsize: int,
    ) -> Floats:  # fmt: skip
        """Of the buffers between source and result of every path, with what is copied after it
        was gathered; 0 where there is no path."""
        graph, distances = self._of(shape, itemsize)
        local = graph.local_elements(shape) * itemsize
        copied = np.append(self._copied_bytes(graph, shape, itemsize), 0.0)
        columns = [graph.number[t] for t in targets]
        found = np.zeros((len(sources), len(targets)))
        for i, spec in enumerate(sources):
            source = graph.number[spec]
            last = distances.last(source)
            before = np.append(graph.arrays[0], source)[last]
            buffer = np.where(before != source, local[before], 0.0) + copied[last]
            total, at = buffer, before
            while (at != source).any():  # as often as the longest path has moves
                total, at = total + buffer[at], before[at]
            found[i] = total[columns]
        return found

    def gathers_last(
        self, sources: Sequence[Spec], targets: Sequence[Spec], shape: tuple[int, ...],
        itemsize: int, counts: Callable[[tuple[str, ...]], bool],
    ) -> NDArray[np.bool_]:  # fmt: skip
        """Whether paths end with an all-gather over axes that count."""
        graph, distances = self._of(shape, itemsize)
        last = {m.axes: counts(m.axes) for _, _, m in graph.moves if m.kind == "all-gather"}
        gathers = np.array(
            [m.kind == "all-gather" and last[m.axes] for _, _, m in graph.moves] + [False]
        )
        columns = [graph.number[t] for t in targets]
        return np.array([gathers[distances.last(graph.number[s])][columns] for s in sources])

    def _copied_bytes(self, graph: SpecGraph, shape: tuple[int, ...], itemsize: int) -> Floats:
        """Of every move what is copied after it."""
        copying = self.copying(graph, shape, itemsize)
        if not copying.any():
            return copying
        return np.where(copying > 0, graph.payloads(shape) * itemsize, 0.0)

    def _of(self, shape: tuple[int, ...], itemsize: int) -> tuple[SpecGraph, Distances]:
        if (shape, itemsize) not in self._known:
            self._known[shape, itemsize] = self._graph_of(shape, itemsize)
        return self._known[shape, itemsize]

    def _graph_of(self, shape: tuple[int, ...], itemsize: int) -> tuple[SpecGraph, Distances]:
        rank = len(shape)
        if rank not in self._graphs:
            self._graphs[rank] = SpecGraph(rank, self.splitting, self.uneven)
        graph = self._graphs[rank]
        if shape not in self._fits:
            self._fits[shape] = np.array(
                [s.fits(shape, self.splitting, self.uneven) for s in graph.specs]
            )
        fits = self._fits[shape]
        key: tuple[Any, ...] = (rank, prod(shape) * itemsize, fits.tobytes())
        copying = self.copying(graph, shape, itemsize)
        if copying.any():
            key = (*key, copying.tobytes())
        if self.uneven and (np.array(shape, dtype=np.int64) % graph.parts[fits]).any():
            key = (shape, itemsize)
        if key not in self._distances:
            padded = np.any(np.array(shape, dtype=np.int64) % graph.parts[fits], axis=0)
            self._distances[key] = Distances(
                graph, self._weights(graph, shape, itemsize, fits), graph.barred(padded)
            )
        return graph, self._distances[key]

    def copying(self, graph: SpecGraph, shape: tuple[int, ...], itemsize: int) -> Floats:
        """Of every move of such a tensor the seconds of copying what was gathered."""
        if (shape, itemsize) not in self._copying:
            self._copying[shape, itemsize] = self._copies(graph, shape, itemsize)
        return self._copying[shape, itemsize]

    def _copies(self, graph: SpecGraph, shape: tuple[int, ...], itemsize: int) -> Floats:
        found = np.zeros(len(graph.moves))
        if self.copy is None:
            return found
        size, sources, dims = graph.payloads(shape) * itemsize, graph.arrays[0], graph.ends[0]
        for (kind, axes), edges in graph.alike.items():
            for dim in range(graph.rank) if kind == "all-gather" else ():
                along = edges[dims[edges] == dim]
                width = -(-shape[dim] // graph.parts[sources[along], dim])
                found[along] = self.copy(graph.rank, dim, axes, width, size[along])
        return found

    def _weights(
        self, graph: SpecGraph, shape: tuple[int, ...], itemsize: int, fits: NDArray[np.bool_]
    ) -> Floats:
        u, v = graph.arrays
        weights = np.full(len(u), MOVE_EPSILON_S)
        payload_bytes = graph.payloads(shape) * itemsize
        for (kind, axes), edges in graph.alike.items():
            if kind not in FREE:
                weights[edges] += self.price(kind, axes, payload_bytes[edges])
        weights += self.copying(graph, shape, itemsize)
        weights[~(fits[u] & fits[v])] = np.inf
        if self.uneven:
            weights[~graph.aligned(shape)] = np.inf
        return weights


# ---- specs and moves ------------------------------------------------------------------------


def _ordered_specs(rank: int, sizes: Sizes) -> Iterator[Spec]:
    """Every spec; partial axes in mesh order, the axes of a dimension in every order."""
    axes = tuple(sizes)
    places: list[tuple[int, ...]] = [()]
    for _ in axes:  # −2: nowhere, −1: partial, else the dimension
        places = [(*p, d) for p in places for d in range(-2, rank)]
    for place in places:
        partial = tuple(a for a, d in zip(axes, place, strict=True) if d == -1)
        at = list(zip(axes, place, strict=True))
        grouped = [tuple(a for a, d in at if d == k) for k in range(rank)]
        partly: list[tuple[tuple[str, ...], ...]] = [()]
        for group in grouped:
            partly = [(*dims, order) for dims in partly for order in permutations(group)]
        yield from (Spec(dims, partial) for dims in partly)


def _moves(spec: Spec, sizes: Sizes, uneven: bool) -> Iterator[Move]:
    """Every collective that applies to `spec`."""
    yield from _reductions(spec)
    for d, axes in enumerate(spec.dims):
        for k in range(1, len(axes) + 1):
            tail, rest = axes[-k:], axes[:-k]
            yield Move("all-gather", tail, _with(spec, {d: rest}), d)
            for to in range(len(spec.dims)):
                if to != d:
                    moved = _with(spec, {d: rest, to: (*spec.dims[to], *tail)})
                    yield Move("all-to-all", tail, moved, d, to)
        for order in permutations(axes):
            if order != axes:
                yield Move("collective-permute", axes, _with(spec, {d: order}), d, order=order)
    used = {*spec.axes, *spec.partial}
    for axis in (a for a in sizes if a not in used):
        for d in range(len(spec.dims)):
            yield Move("slice", (axis,), _with(spec, {d: (*spec.dims[d], axis)}), d)
        partial = tuple(a for a in sizes if a in {*spec.partial, axis})
        yield Move("mask", (axis,), Spec(spec.dims, partial))
    if uneven:
        yield from _cuts_at_once(spec, [a for a in sizes if a not in used])


def _cuts_at_once(spec: Spec, unused: Sequence[str]) -> Iterator[Move]:
    """Several axes cut a whole dimension where one after the other would not cut into blocks."""
    for d in (d for d, axes in enumerate(spec.dims) if not axes):
        for count in range(2, len(unused) + 1):
            for axes in permutations(unused, count):
                yield Move("slice", axes, _with(spec, {d: axes}), d)


def _reductions(spec: Spec) -> Iterator[Move]:
    """All-reduce and reduce-scatter over one pending axis, or over all of them at once."""
    pending = spec.partial
    groups = [(a,) for a in pending] + ([pending] if len(pending) > 1 else [])
    for axes in groups:
        rest = tuple(a for a in pending if a not in axes)
        yield Move("all-reduce", axes, _with(spec, {}, rest))
        for d in range(len(spec.dims)):
            for order in permutations(axes):
                grown = _with(spec, {d: (*spec.dims[d], *order)}, rest)
                yield Move("reduce-scatter", order, grown, d)


def _mixes(source: Spec, target: Spec, reduce: str) -> bool:
    """Whether the reader would add up what has to be combined in another way."""
    return reduce != "sum" and any(a in target.partial for a in source.partial)


def _with(
    spec: Spec, dims: dict[int, tuple[str, ...]], partial: Sequence[str] | None = None
) -> Spec:
    changed = tuple(dims.get(i, d) for i, d in enumerate(spec.dims))
    return Spec(changed, spec.partial if partial is None else tuple(partial))
