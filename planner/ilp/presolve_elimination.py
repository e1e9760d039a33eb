"""Removing nodes without usage that touch at most two others, by minimising over them.

    degree 0: the cheapest strategy
    degree 1: c_k[l]     += min_a (c[a] + E[a, l])
    degree 2: E_kl[p, q] += min_a (c[a] + E_k[a, p] + E_l[a, q])

Only this local elimination belongs here; `elimination` does whole graphs.
"""

from __future__ import annotations

import numpy as np

from planner.ilp.work import Infeasible, Ints, Work

MAX_CELLS = 4_000_000
"""Largest cube [a, p, q] that is minimised (32 MB of float64)."""


def eliminate(work: Work, n: int, *, max_degree: int = 2) -> bool:
    """Eliminates `n` if it has no usage and few neighbours; True if it went."""
    if work.uses[n] or len(work.adj[n]) > max_degree:
        return False
    neighbours = list(work.adj[n])
    if not neighbours:
        best = int(np.argmin(work.costs[n]))
        if not np.isfinite(work.costs[n][best]):
            raise Infeasible(f"node {n} has no strategy")
        work.settle(n, best)
        return True
    if len(neighbours) == 1:
        _eliminate_leaf(work, n, neighbours[0])
        return True
    k, m = neighbours
    if work.size(n) * work.size(k) * work.size(m) > MAX_CELLS:
        return False
    _eliminate_middle(work, n, k, m)
    return True


def _eliminate_leaf(work: Work, n: int, k: int) -> None:
    table = work.costs[n][:, None] + work.adj[n][k]
    best: Ints = table.argmin(axis=0)
    work.costs[k] = work.costs[k] + table.min(axis=0)
    work.remove(n)

    def undo(x: Ints) -> None:
        x[n] = best[x[k]]

    work.trail.append(undo)


def _eliminate_middle(work: Work, n: int, k: int, m: int) -> None:
    left = work.costs[n][:, None] + work.adj[n][k]
    table = left[:, :, None] + work.adj[n][m][:, None, :]
    best: Ints = table.argmin(axis=0)
    work.remove(n)
    work.add_edge(k, m, table.min(axis=0))

    def undo(x: Ints) -> None:
        x[n] = best[x[k], x[m]]

    work.trail.append(undo)
