"""Reductions that one edge allows: arc consistency, contraction, folding.

Only rules that look at a single matrix belong here.

* A strategy that is forbidden with every strategy of a neighbour can never be chosen.
* If every strategy of i leaves exactly one of j, then j is a function of i and merges into it.
* A separable matrix, u[a] + v[b], is two node costs and no edge.
"""

from __future__ import annotations

import numpy as np

from planner.ilp.problem import Matrix
from planner.ilp.work import Infeasible, Work

SEPARABLE_SHARE = 1e-13
"""A matrix counts as separable if the mixed differences are below this share of its largest
entry: rounding noise of float64 sums, and exactly zero for integers below 10^13."""


def drop_infinite(work: Work, n: int) -> bool:
    """Removes strategies of infinite cost; True if there were any."""
    finite = np.isfinite(work.costs[n])
    if finite.all():
        return False
    work.keep(n, np.flatnonzero(finite))
    return True


def reduce_edge(work: Work, i: int, j: int) -> bool:
    """Applies the first rule that fits edge (i, j); True if the problem changed."""
    cost = work.adj[i][j]
    finite = np.isfinite(cost)
    if finite.all():
        return _fold(work, i, j, cost)
    rows = finite.sum(axis=1)
    columns = finite.sum(axis=0)
    if not rows.all():
        work.keep(i, np.flatnonzero(rows))
        return True
    if not columns.all():
        work.keep(j, np.flatnonzero(columns))
        return True
    if rows.max() == 1:
        work.contract(j, i, finite.argmax(axis=1))
        return True
    if columns.max() == 1:
        work.contract(i, j, finite.argmax(axis=0))
        return True
    return False


def _fold(work: Work, i: int, j: int, cost: Matrix) -> bool:
    """Moves a separable matrix into the node costs."""
    if cost.size == 0:
        raise Infeasible(f"node {i} or {j} has no strategy")
    first = cost[0]
    mixed = (cost - first) - (cost[:, :1] - first[0])
    if np.abs(mixed).max() > SEPARABLE_SHARE * np.abs(cost).max():
        return False
    work.costs[i] = work.costs[i] + (cost[:, 0] - first[0])
    work.costs[j] = work.costs[j] + first
    work.drop_edge(i, j)
    return True
