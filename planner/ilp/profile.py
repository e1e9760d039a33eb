"""Usage over time of many choices, fast: the items of a working problem as flat arrays.

Only sums of usages belong here. A choice (or a fractional x) is turned into load at every
time point by one bincount at the spans' ends and a cumulative sum.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from planner.ilp.problem import Vector
from planner.ilp.work import Work

Ints = NDArray[np.int64]

PEAKS_AT_ONCE = 40
"""Memory rows added in one round: enough to fix the worst overloads, few enough that the
program stays small (most points never bind)."""


class Profile:
    """Column layout: x[n, s] is column `first[n] + s`, nodes in the order of `work.nodes()`."""

    def __init__(self, work: Work) -> None:
        self.base = work.base
        self.limit = work.limit
        self.first = np.zeros(work.original, dtype=np.int64)
        self.nodes = np.array(work.nodes(), dtype=np.int64)
        begin: list[int] = []
        end: list[int] = []
        columns: list[Ints] = []
        amounts: list[Vector] = []
        count = 0
        for n in self.nodes.tolist():
            self.first[n] = count
            for (a, b), amount in work.uses[n].items():
                used = np.flatnonzero(amount)
                begin += [a] * len(used)
                end += [b] * len(used)
                columns.append(count + used)
                amounts.append(amount[used])
            count += work.size(n)
        self.columns = count
        self.begin = np.array(begin, dtype=np.int64)
        self.end = np.array(end, dtype=np.int64)
        self.column = np.concatenate([np.zeros(0, dtype=np.int64), *columns])
        self.amount = np.concatenate([np.zeros(0), *amounts])

    def load(self, x: Vector) -> Vector:
        """Load [time points] of x [columns], fractional or not."""
        weight = self.amount * x[self.column]
        points = len(self.base) + 1
        born = np.bincount(self.begin, weights=weight, minlength=points)
        gone = np.bincount(self.end, weights=weight, minlength=points)
        total: Vector = self.base + np.cumsum(born - gone)[:-1]
        return total

    def price(self, prices: Vector) -> Vector:
        """Σ over live points of prices[t] · amount, per column: the multipliers' node costs."""
        upto = np.concatenate([[0.0], np.cumsum(prices)])
        weight = self.amount * (upto[self.end] - upto[self.begin])
        return np.bincount(self.column, weights=weight, minlength=self.columns).astype(np.float64)

    def load_of(self, choice: Ints) -> Vector:
        """Load under a choice indexed by node."""
        x = np.zeros(self.columns)
        x[self.first[self.nodes] + choice[self.nodes]] = 1.0
        return self.load(x)

    def fits(self, load: Vector) -> bool:
        return len(load) == 0 or bool(load.max() <= self.limit * (1 + 1e-12))

    def peaks(self, load: Vector, tolerance: float = 1e-12) -> Ints:
        """The worst point of every overloaded stretch, worst first, at most PEAKS_AT_ONCE."""
        over = load > self.limit * (1 + tolerance)
        if not over.any():
            return np.zeros(0, dtype=np.int64)
        edges = np.flatnonzero(np.diff(np.concatenate([[0], over.astype(np.int8), [0]])))
        runs = zip(edges[::2], edges[1::2], strict=True)
        worst = [a + int(np.argmax(load[a:b])) for a, b in runs]
        worst.sort(key=lambda t: -load[t])
        return np.array(worst[:PEAKS_AT_ONCE], dtype=np.int64)
