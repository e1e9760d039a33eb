"""The integer linear program of a problem, as plain arrays that any solver can take.

Only the formulation belongs here. With binary x[n, s] (node n takes strategy s) and
continuous y[e, p, q] ≥ 0 (edge e joins row class p to column class q):

    minimise    Σ c[n, s] x[n, s] + Σ d[e, p, q] y[e, p, q]
    one         Σ_s x[n, s] = 1                                for every node       _one_rows
    left        Σ_q y[e, p, q] = Σ_{s in row class p} x[i, s]                       _edge_rows
    right       Σ_p y[e, p, q] = Σ_{s in column class q} x[j, s]                    _edge_rows
    memory      Σ usage[n, s, t] x[n, s] ≤ limit − base[t]     for chosen t         memory_rows

Rows of an edge matrix that differ by a constant are one class (`group`): the constant moves
to the node's cost. An edge of classes P × Q has at most |P|·|Q| variables and |P|+|Q| rows
however many strategies its ends have. Forbidden pairs have no variable. For integral x the
marginals force y to the chosen pair, so y needs no integrality.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from planner.ilp.problem import Matrix, Vector
from planner.ilp.work import Work

Ints = NDArray[np.int64]
SAME_SHARE = 1e-13
"""Entries within this share of a matrix's largest are the same (float64 rounding)."""


@dataclass
class Rows:
    """Sparse rows: `lower` ≤ A·columns ≤ `upper`, in compressed row form."""

    start: list[int] = field(default_factory=lambda: [0])
    index: list[Ints] = field(default_factory=list)
    value: list[Vector] = field(default_factory=list)
    lower: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)

    def add(self, index: Ints, value: Vector, lower: float, upper: float) -> None:
        self.index.append(index)
        self.value.append(value)
        self.start.append(self.start[-1] + len(index))
        self.lower.append(lower)
        self.upper.append(upper)

    def flat(self) -> tuple[Ints, Ints, Vector, Vector, Vector]:
        """start, index, value, lower, upper as arrays."""
        empty = np.zeros(0)
        index = np.concatenate(self.index) if self.index else empty.astype(np.int64)
        value = np.concatenate(self.value) if self.value else empty
        return (
            np.array(self.start, dtype=np.int64), index, value,
            np.array(self.lower), np.array(self.upper),
        )  # fmt: skip


@dataclass
class Pairs:
    """The y variables of one edge: classes of both ends and the first column."""

    i: int
    j: int
    row_class: Ints
    column_class: Ints
    first: int
    index: Ints
    """[P, Q]: offset of the variable from `first`, -1 where forbidden."""


@dataclass
class Linear:
    """`first[n]` is the column of x[n, 0]; the first `binaries` columns are the x.

    All costs are at least 0, so `offset` is a bound, and a column dearer than what an optimum
    may cost above `offset` is zero in it.
    """

    nodes: list[int]
    first: dict[int, int]
    sizes: dict[int, int]
    binaries: int
    cost: Vector
    offset: float
    pairs: list[Pairs]
    rows: Rows

    def columns(self, choice: Ints) -> Vector:
        """All variables at a choice (indexed by node)."""
        x = np.zeros(len(self.cost))
        for n in self.nodes:
            x[self.first[n] + choice[n]] = 1.0
        for p in self.pairs:
            at = p.index[p.row_class[choice[p.i]], p.column_class[choice[p.j]]]
            if at >= 0:
                x[p.first + at] = 1.0
        return x

    def choice(self, x: Vector, length: int) -> Ints:
        """The strategy of largest x for every node."""
        picked = np.zeros(length, dtype=np.int64)
        for n in self.nodes:
            picked[n] = int(np.argmax(x[self.first[n] : self.first[n] + self.sizes[n]]))
        return picked


def linearise(work: Work) -> Linear:
    """The program of `work` without memory rows."""
    nodes = work.nodes()
    first: dict[int, int] = {}
    count = 0
    for n in nodes:
        first[n] = count
        count += work.size(n)
    sizes = {n: work.size(n) for n in nodes}
    own = {n: work.costs[n].copy() for n in nodes}
    rows = Rows()
    _one_rows(rows, nodes, first, sizes)
    pairs: list[Pairs] = []
    costs: list[Vector] = []
    at = count
    for i in nodes:
        for j, cost in work.adj[i].items():
            if i < j:
                found = _edge_rows(rows, i, j, cost, own, first, at)
                pairs.append(found[0])
                costs.append(found[1])
                at += len(found[1])
    offset = work.offset
    for n in nodes:
        offset += float(own[n].min())
        own[n] -= own[n].min()
    cost_vector = np.concatenate([own[n] for n in nodes] + costs) if nodes else np.zeros(0)
    return Linear(nodes, first, sizes, count, cost_vector, offset, pairs, rows)


def _one_rows(rows: Rows, nodes: list[int], first: dict[int, int], sizes: dict[int, int]) -> None:
    for n in nodes:
        rows.add(np.arange(first[n], first[n] + sizes[n]), np.ones(sizes[n]), 1.0, 1.0)


def _edge_rows(
    rows: Rows, i: int, j: int, cost: Matrix, own: dict[int, Vector], first: dict[int, int], at: int
) -> tuple[Pairs, Vector]:  # fmt: skip
    """Adds the marginal rows of edge (i, j), whose variables start at column `at`."""
    up, left_class, reduced = group(cost)
    across, right_class, core_t = group(np.ascontiguousarray(reduced.T))
    core = core_t.T
    own[i] += up
    own[j] += across
    finite = np.isfinite(core)
    index = np.full(core.shape, -1, dtype=np.int64)
    index[finite] = np.arange(finite.sum())
    pairs = Pairs(i, j, left_class, right_class, at, index)
    sides = ((i, left_class, index), (j, right_class, index.T))
    for n, classes, table in sides:
        for p in range(len(table)):
            mine = table[p][table[p] >= 0] + at
            strategies = first[n] + np.flatnonzero(classes == p)
            columns = np.concatenate([mine, strategies])
            signs = np.concatenate([np.ones(len(mine)), -np.ones(len(strategies))])
            rows.add(columns, signs, 0.0, 0.0)
    return pairs, core[finite]


def group(cost: Matrix) -> tuple[Vector, Ints, Matrix]:
    """Rows up to a constant: (constant per row, class per row, one row per class)."""
    least = cost.min(axis=1)
    least = np.where(np.isfinite(least), least, 0.0)
    level = cost - least[:, None]
    finite = level[np.isfinite(level)]
    unit = SAME_SHARE * float(finite.max()) if finite.size else 0.0
    key = np.round(level / unit) if unit > 0 else level
    keys: dict[bytes, int] = {}
    classes = np.array([keys.setdefault(row.tobytes(), len(keys)) for row in key + 0.0])
    _, where = np.unique(classes, return_index=True)
    return least, classes.astype(np.int64), level[where]


def memory_rows(work: Work, linear: Linear, points: Iterable[int], scale: float) -> Rows:
    """One row per time point, in units where the limit is `scale`."""
    wanted = list(points)
    rows = Rows()
    unit = scale / work.limit if work.limit > 0 else 1.0
    parts: dict[int, tuple[list[Ints], list[Vector]]] = {t: ([], []) for t in wanted}
    order = np.array(sorted(wanted), dtype=np.int64)
    for n in linear.nodes:
        for (a, b), amount in work.uses[n].items():
            lo, hi = np.searchsorted(order, [a, b])
            for t in order[lo:hi].tolist():
                parts[t][0].append(linear.first[n] + np.arange(len(amount)))
                parts[t][1].append(amount * unit)
    for t in wanted:
        index = np.concatenate([np.zeros(0, dtype=np.int64), *parts[t][0]])
        value = np.concatenate([np.zeros(0), *parts[t][1]])
        index, inverse = np.unique(index, return_inverse=True)
        value = np.bincount(inverse, weights=value, minlength=len(index)).astype(np.float64)
        used = value > 0
        rows.add(index[used], value[used], -np.inf, (work.limit - work.base[t]) * unit)
    return rows
