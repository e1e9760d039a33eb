"""Reductions by comparison: a strategy (or a pair) never better than another is dropped.

Only exchange arguments belong here. Strategy a dominates b at node n if swapping b for a
never costs more, whatever the neighbours do, and never occupies more:

    c[a] - c[b] + Σ_edges max_l (E[a, l] - E[b, l]) ≤ 0   and   use[a] ≤ use[b] on every span.

The same with one edge held at a given l forbids the pair (b, l) instead of the strategy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from planner.ilp.problem import Matrix, Vector
from planner.ilp.work import Ints, Work

CHUNK_CELLS = 100_000
"""Cells of the comparison cube computed at once: 800 kB stay in the processor's cache."""
WORTH_GROUPING = 30_000
"""Cells of the cube above which finding equal rows first pays."""
WORTH_REMEMBERING = 4_000
"""Cells of the cube above which looking for the same matrix first pays."""
REMEMBERED_CELLS = 50_000_000
"""Cells of remembered results: 400 MB; then everything is forgotten."""

Mask = NDArray[np.bool_]
Change = TypeVar("Change", Matrix, "Matrix | None")


class Memory:
    """Results by content: layers repeat, so most comparisons have been made before."""

    def __init__(self) -> None:
        self.known: dict[tuple[Any, ...], Any] = {}
        self.cells = 0

    def call(self, function: Callable[..., Change], *arrays: Matrix) -> Change:
        """`function(*arrays)`, remembered where that is cheaper than computing it."""
        first = arrays[0]
        if first.size * len(first) < WORTH_REMEMBERING:
            return function(*arrays)
        key = (function, *((a.shape, _digest(a)) for a in arrays))
        if key not in self.known:
            found = function(*arrays)
            self.cells += 0 if found is None else found.size
            if self.cells > REMEMBERED_CELLS:
                self.known.clear()
                self.cells = 0
            self.known[key] = found
        result: Change = self.known[key]
        return result


def _digest(array: Matrix) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(array).data, digest_size=16).digest()


def worst_change(cost: Matrix) -> Matrix:
    """max over l of cost[a, l] - cost[b, l] for all a, b; what b forbids costs nothing.

    Strategies with the same specs have rows (columns) that differ by a constant: one of each
    is enough for the comparison, which is cubic.
    """
    if cost.size * len(cost) < WORTH_GROUPING:
        return _worst_change(cost)
    _, _, some = distinct(cost.T)
    level, group, rows = distinct(np.ascontiguousarray(some.T))
    change = _worst_change(rows)[group[:, None], group[None, :]]
    shift: Matrix = change + (level[:, None] - level[None, :])
    return shift


def distinct(cost: Matrix) -> tuple[Vector, Ints, Matrix]:
    """Rows up to a constant: (constant and group of each row, one row of each group)."""
    least = cost.min(axis=1)
    least = np.where(np.isfinite(least), least, 0.0)
    level = np.ascontiguousarray(cost - least[:, None]) + 0.0
    seen: dict[bytes, int] = {}
    first: list[int] = []
    group = np.empty(len(cost), dtype=np.int64)
    for k, row in enumerate(level):
        at = seen.setdefault(row.tobytes(), len(first))
        if at == len(first):
            first.append(k)
        group[k] = at
    return least, group, level[first]


def _worst_change(cost: Matrix) -> Matrix:
    size, width = cost.shape
    step = max(1, CHUNK_CELLS // max(1, size * width))
    parts = []
    with np.errstate(invalid="ignore"):
        for at in range(0, size, step):
            cube = cost[at : at + step, None, :] - cost[None, :, :]
            parts.append(np.fmax.reduce(cube, axis=2))
    change: Matrix = np.concatenate(parts)
    return np.where(np.isnan(change), -np.inf, change)


def no_more_use(work: Work, n: int) -> Mask:
    """[a, b]: a occupies at most what b does, on every span."""
    size = work.size(n)
    fits = np.ones((size, size), dtype=bool)
    for amount in work.uses[n].values():
        fits &= amount[:, None] <= amount[None, :]
    return fits


def own_change(work: Work, n: int) -> Matrix:
    """[a, b]: what swapping b for a changes in the node's own cost; inf where it uses more."""
    cost = work.costs[n]
    with np.errstate(invalid="ignore"):
        change = cost[:, None] - cost[None, :]
    return np.where(no_more_use(work, n) & ~np.isnan(change), change, np.inf)


def drop_dominated(work: Work, n: int) -> bool:
    """Removes dominated strategies of `n`; of equals the first stays. True if any went.

    Comparing two is linear in the neighbours' strategies, so pairs are first compared where the
    neighbours suit b best: few strategies are better even there. What is better there by most
    comes before the others, since one is enough.
    """
    if work.size(n) < 2:
        return False
    own = own_change(work, n)
    costs = list(work.adj[n].values())
    at_best = [change_at_best(cost) for cost in costs]
    with np.errstate(invalid="ignore"):
        change = sum(at_best, own)
    hopeful = change <= 0
    np.fill_diagonal(hopeful, False)
    b = np.flatnonzero(hopeful.any(axis=0))
    a = np.where(hopeful, change, np.inf).argmin(axis=0)[b]
    beats = _beats(own, costs, at_best, a, b)
    hopeful[a, b] = False
    hopeful[:, beats.any(axis=0)] = False
    beats |= _beats(own, costs, at_best, *np.nonzero(hopeful))
    kept = undominated(beats)
    if len(kept) == work.size(n):
        return False
    work.keep(n, kept)
    return True


def _beats(
    own: Matrix, costs: Sequence[Matrix], at_best: Sequence[Matrix], a: Ints, b: Ints
) -> Mask:
    """[a, b]: the pairs (a[i], b[i]) of which the first dominates the second."""
    parts = [own[a, b], *(change[a, b] for change in at_best)]
    for k, cost in enumerate(costs, 1):
        if not len(a):
            break
        parts[k] = worst_of_pairs(cost, a, b)
        with np.errstate(invalid="ignore"):
            left = sum(parts) <= 0
        a, b, parts = a[left], b[left], [part[left] for part in parts]
    beats = np.zeros(own.shape, dtype=bool)
    beats[a, b] = True
    return beats


def change_at_best(cost: Matrix) -> Matrix:
    """[a, b]: cost[a, l] - cost[b, l] at the l that is cheapest for b, so at most the worst."""
    best = cost.argmin(axis=1)
    with np.errstate(invalid="ignore"):
        change: Matrix = cost[:, best] - cost[np.arange(len(cost)), best]
    return change


def worst_of_pairs(cost: Matrix, a: Ints, b: Ints) -> Vector:
    """`worst_change` of the pairs (a[i], b[i]) alone."""
    step = max(1, CHUNK_CELLS // cost.shape[1])
    parts = []
    with np.errstate(invalid="ignore"):
        for at in range(0, len(a), step):
            change = cost[a[at : at + step]] - cost[b[at : at + step]]
            parts.append(np.fmax.reduce(change, axis=1))
    return np.concatenate(parts)


def undominated(beats: Mask) -> Ints:
    """Indices that no other kept index beats, given a transitive relation [a, b]."""
    beats = beats.copy()
    np.fill_diagonal(beats, False)
    candidates = np.flatnonzero(beats.any(axis=0))
    alive = np.ones(len(beats), dtype=bool)
    for b in candidates[::-1]:
        if (beats[:, b] & alive).any():
            alive[b] = False
    return np.flatnonzero(alive)


def forbid_pairs(work: Work, n: int, memory: Memory | None = None) -> bool:
    """Forbids pairs (b, l) on the edges of `n` that another (a, l) dominates."""
    if work.size(n) < 2 or not work.adj[n]:
        return False
    own = own_change(work, n)
    memory = Memory() if memory is None else memory
    parts = {m: memory.call(worst_change, cost) for m, cost in work.adj[n].items()}
    changed = False
    for m in list(parts):
        rest = _sum_without(own, parts, m)
        smaller = memory.call(_forbid_on_edge, work.adj[n][m], rest)
        if smaller is None:
            continue
        work.adj[n][m] = smaller
        work.adj[m][n] = smaller.T
        work.dirty.update((n, m))
        parts[m] = memory.call(worst_change, smaller)
        changed = True
    return changed


def _sum_without(own: Matrix, parts: dict[int, Matrix], m: int) -> Matrix:
    """Worst change over all edges but the one to `m`; inf wherever any part is."""
    with np.errstate(invalid="ignore"):
        total = own + sum((p for k, p in parts.items() if k != m), np.zeros_like(own))
    return np.where(np.isnan(total), np.inf, total)


def _forbid_on_edge(cost: Matrix, rest: Matrix) -> Matrix | None:
    """The matrix with dominated pairs at inf, or None if there are none."""
    hope = np.isfinite(rest)
    np.fill_diagonal(hope, False)
    if not hope.any():
        return None
    smaller: Matrix | None = None
    for b in np.flatnonzero(hope.any(axis=0))[::-1]:
        now = cost if smaller is None else smaller
        others = np.flatnonzero(hope[:, b])
        with np.errstate(invalid="ignore"):
            better = now[others] + rest[others, b][:, None] <= now[b]
        beaten = (better & np.isfinite(now[others])).any(axis=0) & np.isfinite(now[b])
        if beaten.any():
            smaller = cost.copy() if smaller is None else smaller
            smaller[b, beaten] = np.inf
    return smaller
