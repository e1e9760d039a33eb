"""The one problem class of every solver here: choose one strategy per node.

    minimise   Σ_n cost_n[s_n] + Σ_(i,j) cost_ij[s_i, s_j]
    such that  Σ of the usages that are live at t  ≤  limit     for every time point t

A forbidden pair (or strategy) costs +inf. Only data types and plain evaluation live in
this module; solvers, presolve and file formats have modules of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Edge:
    """Cost of every pair of strategies of nodes `i` and `j`: shape [len(i), len(j)]."""

    i: int
    j: int
    cost: Matrix


@dataclass(frozen=True)
class Usage:
    """What each strategy of `node` occupies during the half-open interval [start, stop).

    A node may have several usages (several intervals); they add up where they overlap.
    """

    node: int
    start: int
    stop: int
    amount: Vector


@dataclass(frozen=True)
class Problem:
    """Nodes with strategies, pairwise costs, and usages under one limit (None: no limit)."""

    costs: tuple[Vector, ...]
    edges: tuple[Edge, ...] = ()
    usages: tuple[Usage, ...] = ()
    limit: float | None = None
    names: tuple[str, ...] = field(default=(), compare=False)

    @property
    def size(self) -> int:
        return len(self.costs)


@dataclass(frozen=True)
class Outcome:
    """What a solver found, and how far it can be from the best.

    `status` is "optimal" (gap 0 within tolerance), "feasible" (stopped by the work limit),
    "time_limit" (stopped by the wall clock, with or without a choice), or "infeasible" (proven).
    `cost` is always the plain evaluation of `choice`, as is `peak`, its highest usage; `bound`
    never exceeds the optimum.
    """

    status: str
    choice: NDArray[np.int64] | None
    cost: float
    bound: float
    seconds: float = field(default=0.0, compare=False)
    peak: float = field(default=0.0, compare=False)

    @property
    def gap(self) -> float:
        """Relative distance to the bound; 0 when proven optimal, inf when nothing is known."""
        if self.choice is None:
            return float("inf")
        if self.status == "optimal":
            return 0.0
        scale = max(abs(self.cost), 1e-300)
        return max(0.0, (self.cost - self.bound) / scale)
