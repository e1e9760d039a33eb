"""The strategies that matter: a very large problem cut down to those the dual hardly regrets.

Only the cut belongs here. Most strategies of a node with dozens cost far more than what is left
between incumbent and bound; without them the matrices shrink with the square. It is a heuristic:
the incumbent stays inside, bounds come from the whole problem, and what matters is looked up
again whenever the prices of memory have moved.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.ilp.problem import Vector
from planner.ilp.work import Work

Ints = NDArray[np.int64]

HALVINGS = 40
"""Bisection steps for the margin: to 10^-12 of the largest regret."""


@dataclass
class Focus:
    """`work` has the nodes and time points of the whole; strategy s of n is `labels[n][s]`."""

    work: Work
    labels: list[Ints]

    def inside(self, choice: Ints) -> Ints:
        """A choice of the whole that uses kept strategies only, in the numbering of the cut."""
        inner = np.zeros_like(choice)
        for n in self.work.nodes():
            inner[n] = np.searchsorted(self.labels[n], choice[n])
        return inner


def narrow(work: Work, regret: Vector, keep: list[Ints], most_cells: int) -> Focus:
    """The strategies of least regret, as many as `most_cells` cells allow.

    `regret` follows the labels of the nodes in their order; all strategies of the choices
    `keep` stay.
    """
    nodes = work.nodes()
    first = np.concatenate([[0], np.cumsum([work.size(n) for n in nodes])])
    held = np.zeros(len(regret), dtype=bool)
    for choice in keep:
        held[first[:-1] + choice[nodes]] = True
    inside = (regret <= _margin(work, nodes, first, regret, most_cells)) | held
    core = work.copy()
    labels: list[Ints] = [np.zeros(0, dtype=np.int64)] * work.original
    for n, mask in zip(nodes, np.split(inside, first[1:-1]), strict=True):
        labels[n] = np.flatnonzero(mask)
        if len(labels[n]) < len(mask):
            core.keep(n, labels[n])
    return Focus(core, labels)


def _margin(work: Work, nodes: list[int], first: Ints, regret: Vector, most_cells: int) -> float:
    """The largest regret at which the kept strategies span at most `most_cells` cells."""
    at = {n: k for k, n in enumerate(nodes)}
    ends = np.array([(at[n], at[m]) for n in nodes for m in work.adj[n] if n < m], dtype=np.int64)
    ends = ends.reshape(-1, 2)

    def cells(margin: float) -> int:
        count = np.add.reduceat((regret <= margin).astype(np.int64), first[:-1])
        return int((count[ends[:, 0]] * count[ends[:, 1]]).sum())

    low, high = 0.0, float(regret[np.isfinite(regret)].max(initial=0.0))
    if cells(high) <= most_cells:
        return high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if cells(middle) <= most_cells else (low, middle)
    return low
