"""Reductions that one edge allows: arc consistency, contraction, folding.

Only rules that look at a single matrix belong here.

* A strategy that is forbidden with every strategy of a neighbour can never be chosen.
* If every strategy of i leaves exactly one of j, then j is a function of i and merges into it.
* A separable matrix, u[a] + v[b], is two node costs and no edge.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from planner.ilp.work import Infeasible, Work

Mask = NDArray[np.bool_]

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
    finite = np.isfinite(work.adj[i][j])
    if finite.all():
        return fold_separable(work, i, j)
    return drop_unsupported(work, i, j, finite) or contract_determined(work, i, j, finite)


def drop_unsupported(work: Work, i: int, j: int, finite: Mask) -> bool:
    """Removes strategies of either end that are forbidden with all of the other's."""
    rows = finite.any(axis=1)
    columns = finite.any(axis=0)
    if not rows.all():
        work.keep(i, np.flatnonzero(rows))
        return True
    if not columns.all():
        work.keep(j, np.flatnonzero(columns))
        return True
    return False


def contract_determined(work: Work, i: int, j: int, finite: Mask) -> bool:
    """Merges one end into the other that determines it (every strategy has support)."""
    if finite.sum(axis=1).max() == 1:
        work.contract(j, i, finite.argmax(axis=1))
        return True
    if finite.sum(axis=0).max() == 1:
        work.contract(i, j, finite.argmax(axis=0))
        return True
    return False


def fold_separable(work: Work, i: int, j: int) -> bool:
    """Moves a separable matrix, which must be finite, into the node costs."""
    cost = work.adj[i][j]
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
