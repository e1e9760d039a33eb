"""A working problem restricted to some nodes, the others fixed: what neighbourhoods solve.

Only cutting out belongs here. The restriction is an ordinary `Work` of its own numbering, so
presolve and exact search apply to it unchanged; memory taken by fixed nodes is in its base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.ilp.problem import Problem, Vector
from planner.ilp.work import Work

Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass
class Part:
    """`work` over the free `nodes`; strategy s of local node k is `labels[k][s]`."""

    work: Work
    nodes: list[int]
    labels: list[Ints]
    cost: float
    """Cost of the current choice within the part."""

    def merge(self, choice: Ints, found: Ints) -> Ints:
        """The whole choice with the part's nodes replaced (`found` is fully expanded)."""
        merged = choice.copy()
        for k, n in enumerate(self.nodes):
            merged[n] = self.labels[k][found[k]]
        return merged


def restrict(
    work: Work, choice: Ints, load: Vector, free: Sequence[int], allowed: Sequence[Mask] | None
) -> Part:
    """The part of `work` over `free`; `allowed[n]` limits strategies (the present one stays)."""
    nodes = sorted(free)
    local = {n: k for k, n in enumerate(nodes)}
    part = Work(Problem(tuple(np.zeros(0) for _ in nodes)))
    part.limit = work.limit
    labels = [_labels(work, n, choice[n], None if allowed is None else allowed[n]) for n in nodes]
    change = np.zeros(len(load) + 1)
    cost = 0.0
    for k, n in enumerate(nodes):
        own = work.costs[n][labels[k]]
        for m, edge in work.adj[n].items():
            j = local.get(m)
            if j is None:
                own = own + edge[labels[k], choice[m]]
            elif k < j:
                part.add_edge(k, j, edge[np.ix_(labels[k], labels[j])])
                cost += float(edge[choice[n], choice[m]])
        part.costs[k] = own
        cost += float(own[np.searchsorted(labels[k], choice[n])])
        for (a, b), amount in work.uses[n].items():
            change[a] -= amount[choice[n]]
            change[b] += amount[choice[n]]
    part.base = load + np.cumsum(change)[:-1]
    for k, n in enumerate(nodes):
        for span, amount in work.uses[n].items():
            part.add_use(k, span, amount[labels[k]])
    return Part(part, nodes, labels, cost)


def _labels(work: Work, n: int, present: int, allowed: Mask | None) -> Ints:
    if allowed is None:
        return np.arange(work.size(n))
    kept = allowed.copy()
    kept[present] = True
    return np.flatnonzero(kept)
