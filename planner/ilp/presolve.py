"""Exact presolve: applies the reductions until none of them changes anything.

Only the order of the rules belongs here; each rule lives in a `presolve_*` module. Cheap
rules (one edge) run to a fixed point before dear ones (comparing strategies).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from planner.ilp.presolve_dominance import Memory, drop_dominated, forbid_pairs
from planner.ilp.presolve_edges import drop_infinite, reduce_edge
from planner.ilp.presolve_elimination import eliminate
from planner.ilp.problem import Matrix
from planner.ilp.work import Work

STILL_SHRINKING = 0.98
"""Comparing pairs is dear: another round only if the last one left at most this share."""
PAIRED_CELLS = 1_000_000
"""Matrix entries up to which pairs are compared: beyond, it would take longer than it saves,
and neighbourhoods are presolved again by themselves."""
Edges = dict[tuple[int, int], Matrix]
ROUNDS = 20
"""Rounds of trimming time and starting over; each needs the one before to have helped."""


def presolve(work: Work, *, out_of_time: Callable[[], bool] = lambda: False) -> None:
    """Shrinks `work` in place. Raises Infeasible when it proves that nothing fits."""
    seen: Edges = {}
    memory = Memory()
    paired: dict[int, int] = {}
    before = np.inf
    for turn in range(ROUNDS):
        work.trim_time()
        work.drop_crowded()
        if not work.dirty:
            break
        _shrink(work, seen, memory, out_of_time)
        labels = _labels(work)
        last = turn == ROUNDS - 1  # forbidden pairs must be followed by the edge rules
        shrinking = labels <= before * STILL_SHRINKING
        if last or out_of_time() or not shrinking or _cells(work) > PAIRED_CELLS:
            break
        before = labels
        _forbid(work, paired, memory, out_of_time)


def _labels(work: Work) -> int:
    return sum(work.size(n) for n in work.nodes())


def _cells(work: Work) -> int:
    return sum(c.size for n in work.nodes() for m, c in work.adj[n].items() if n < m)


def _shrink(
    work: Work, seen: Edges, memory: Memory, out_of_time: Callable[[], bool]
) -> None:  # fmt: skip
    """Edge rules first, then dominance and elimination, until no node is dirty."""
    waiting: set[int] = set()
    while work.dirty or waiting:
        if work.dirty:
            batch = sorted(work.dirty)
            work.dirty.clear()
            for n in batch:
                if work.present[n]:
                    waiting.add(n)
                    _cheap(work, n, seen)
            continue
        if out_of_time():
            return
        batch, waiting = sorted(waiting), set()
        for n in batch:
            if work.present[n] and not eliminate(work, n):
                drop_dominated(work, n)


def _cheap(work: Work, n: int, seen: Edges) -> None:
    """Rules that look at one node or one edge."""
    if drop_infinite(work, n):
        return
    if work.size(n) == 1:
        work.settle(n, 0)
        return
    for m in list(work.adj[n]):
        key = (n, m) if n < m else (m, n)
        cost = work.adj[key[0]].get(key[1])
        if cost is None or seen.get(key) is cost:
            continue
        if reduce_edge(work, *key):
            work.dirty.update(k for k in key if work.present[k])
            return
        seen[key] = cost


def _forbid(
    work: Work, paired: dict[int, int], memory: Memory, out_of_time: Callable[[], bool]
) -> None:  # fmt: skip
    """Dominated pairs; nodes whose surroundings did not change are skipped."""
    for n in work.nodes():
        if out_of_time():
            return
        state = hash((id(work.costs[n]), *(id(c) for c in work.adj[n].values())))
        if paired.get(n) == state:
            continue
        forbid_pairs(work, n, memory)
        paired[n] = hash((id(work.costs[n]), *(id(c) for c in work.adj[n].values())))
