"""The working problem that presolve shrinks, and the trail that undoes it.

Only the mutable graph and its exact elementary moves belong here: removing strategies,
contracting a node, folding an edge. Which move to make when is decided by `presolve_*`.
Every move keeps, for each remaining choice, a full choice of the same cost and usage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from planner.ilp.problem import Matrix, Problem, Vector
from planner.ilp.timeline import compress

Ints = NDArray[np.int64]
Span = tuple[int, int]
Undo = Callable[[Ints], None]


class Infeasible(Exception):
    """A proof that no choice satisfies the problem."""


class Work:
    """Nodes with `costs`, symmetric adjacency `adj[i][j]` (matrix [i, j]) and `uses`.

    `uses[n][span]` is what the strategies of `n` occupy at the time points of the half-open
    span, above their minimum; the minimum itself is in `base` [time points]. `offset` is cost
    already decided. A node that is gone has `present[n]` False and no edges or uses.
    """

    def __init__(self, problem: Problem, *, memory: bool = True) -> None:
        n = problem.size
        self.original = n
        self.costs: list[Vector] = [np.asarray(c, dtype=np.float64).copy() for c in problem.costs]
        self.adj: list[dict[int, Matrix]] = [{} for _ in range(n)]
        self.uses: list[dict[Span, Vector]] = [{} for _ in range(n)]
        self.present = [True] * n
        self.offset = 0.0
        self.trail: list[Undo] = []
        self.limit = np.inf if problem.limit is None or not memory else float(problem.limit)
        self.base: Vector = np.zeros(0)
        self.dirty: set[int] = set(range(n))
        for e in problem.edges:
            if e.i == e.j:
                self.costs[e.i] += np.diagonal(e.cost)
            else:
                self.add_edge(e.i, e.j, np.asarray(e.cost, dtype=np.float64))
        if np.isfinite(self.limit):
            self._load_usages(problem)

    def _load_usages(self, problem: Problem) -> None:
        live = [u for u in problem.usages if u.start < u.stop]
        starts = np.array([u.start for u in live], dtype=np.int64)
        stops = np.array([u.stop for u in live], dtype=np.int64)
        lo, hi, points = compress(starts, stops)
        self.base = np.zeros(points)
        for u, a, b in zip(live, lo.tolist(), hi.tolist(), strict=True):
            if a < b:
                self.add_use(u.node, (a, b), np.asarray(u.amount, dtype=np.float64))

    # ---- reading ----------------------------------------------------------------------------

    def nodes(self) -> list[int]:
        return [n for n, there in enumerate(self.present) if there]

    def size(self, n: int) -> int:
        return len(self.costs[n])

    def expand(self, choice: Ints) -> Ints:
        """A choice of the original problem from one of the remaining nodes (in place copy)."""
        full = np.array(choice, dtype=np.int64)
        for undo in reversed(self.trail):
            undo(full)
        return full

    def copy(self) -> Work:
        """An independent problem of the same nodes; its trail starts empty."""
        other = Work(Problem(()))
        other.original = self.original
        other.costs = list(self.costs)
        other.adj = [dict(near) for near in self.adj]
        other.uses = [dict(uses) for uses in self.uses]
        other.present = list(self.present)
        other.offset, other.limit, other.base = self.offset, self.limit, self.base.copy()
        other.dirty = set(self.nodes())
        return other

    def weighted(self, weight: float) -> Work:
        """The same nodes, edges and usages at costs times `weight` > 0 (for reading only)."""
        other = Work(Problem(()))
        other.original = self.original
        other.costs = [c * weight for c in self.costs]
        other.adj = [{m: c * weight for m, c in near.items()} for near in self.adj]
        other.uses, other.present = self.uses, self.present
        other.offset, other.limit, other.base = self.offset * weight, self.limit, self.base
        return other

    def without_memory(self) -> Work:
        """A copy without usages; its choices expand to ones of this problem."""
        other = self.copy()
        other.uses = [{} for _ in range(self.original)]
        other.base, other.limit = np.zeros(0), np.inf
        return other

    # ---- elementary moves -------------------------------------------------------------------

    def add_use(self, n: int, span: Span, amount: Vector) -> None:
        """Adds usage; its minimum over the strategies goes to `base`."""
        if len(amount) == 0:
            raise Infeasible(f"node {n} has no strategy")
        known = self.uses[n].pop(span, None)
        total = amount if known is None else known + amount
        least = total.min()
        if least != 0.0:
            self.base[span[0] : span[1]] += least
            total = total - least
        if total.any():
            self.uses[n][span] = total

    def add_edge(self, i: int, j: int, cost: Matrix) -> None:
        """Adds a matrix [i, j] to what is between the two nodes."""
        known = self.adj[i].get(j)
        if known is not None:
            cost = known + cost
        self.adj[i][j] = cost
        self.adj[j][i] = cost.T

    def drop_edge(self, i: int, j: int) -> None:
        del self.adj[i][j]
        del self.adj[j][i]
        self.dirty.update((i, j))

    def keep(self, n: int, kept: Ints) -> None:
        """Removes all strategies of `n` but `kept` (ascending)."""
        if len(kept) == 0:
            raise Infeasible(f"node {n} has no strategy left")
        self.costs[n] = self.costs[n][kept]
        for m, cost in self.adj[n].items():
            smaller = cost[kept]
            self.adj[n][m] = smaller
            self.adj[m][n] = smaller.T
            self.dirty.add(m)
        uses = self.uses[n]
        self.uses[n] = {}
        for span, amount in uses.items():
            self.add_use(n, span, amount[kept])

        def undo(x: Ints) -> None:
            x[n] = kept[x[n]]

        self.trail.append(undo)
        self.dirty.add(n)

    def contract(self, j: int, i: int, f: Ints) -> None:
        """Replaces `j`, which must be `f[s]` when its neighbour `i` is `s`."""
        self.costs[i] = self.costs[i] + self.costs[j][f]
        edge = self.adj[i].get(j)
        if edge is not None:
            self.costs[i] = self.costs[i] + edge[np.arange(len(f)), f]
        for span, amount in self.uses[j].items():
            self.add_use(i, span, amount[f])
        for k, cost in self.adj[j].items():
            if k != i:
                self.add_edge(i, k, cost[f])

        def undo(x: Ints) -> None:
            x[j] = f[x[i]]

        self.remove(j)
        self.trail.append(undo)
        self.dirty.add(i)

    def settle(self, n: int, s: int) -> None:
        """Fixes `n` to strategy `s`: its costs, usages and edges become constants."""
        self.offset += float(self.costs[n][s])
        for m, cost in self.adj[n].items():
            self.costs[m] = self.costs[m] + cost[s]
        for (a, b), amount in self.uses[n].items():
            self.base[a:b] += amount[s]

        def undo(x: Ints) -> None:
            x[n] = s

        self.remove(n)
        self.trail.append(undo)

    def remove(self, n: int) -> None:
        """Takes `n` out of the graph (the caller has kept what it meant)."""
        for m in self.adj[n]:
            del self.adj[m][n]
            self.dirty.add(m)
        self.adj[n] = {}
        self.uses[n] = {}
        self.present[n] = False
        self.dirty.discard(n)

    # ---- time -------------------------------------------------------------------------------

    def trim_time(self) -> None:
        """Drops time points that no choice of the remaining strategies can overload."""
        if not np.isfinite(self.limit):
            return
        top = self.top_load()
        if self.base.size and self.base.max() > self.limit * (1 + 1e-9):
            raise Infeasible("the least usage exceeds the limit")
        binding = top > self.limit * (1 - 1e-12)
        if binding.all():
            return
        where = np.concatenate([[0], np.cumsum(binding)])
        self.base = self.base[binding]
        for n in self.nodes():
            uses, self.uses[n] = self.uses[n], {}
            for (a, b), amount in uses.items():
                span = (int(where[a]), int(where[b]))
                if span[0] < span[1]:
                    self.add_use(n, span, amount)
            if len(uses) != len(self.uses[n]):
                self.dirty.add(n)

    def drop_crowded(self) -> None:
        """Removes strategies that cannot fit whatever the others do."""
        for n in self.nodes():
            bad = self.crowded(n)
            if len(bad):
                self.keep(n, np.setdiff1d(np.arange(self.size(n)), bad))

    def crowded(self, n: int) -> Ints:
        """Strategies of `n` that alone, over everyone's minimum, exceed the limit."""
        bad = np.zeros(self.size(n), dtype=bool)
        for (a, b), amount in self.uses[n].items():
            bad |= amount > self.limit * (1 + 1e-9) - self.base[a:b].max()
        return np.flatnonzero(bad)

    def top_load(self) -> Vector:
        """The most that can be live at every time point."""
        change = np.zeros(len(self.base) + 1)
        for uses in self.uses:
            for (a, b), amount in uses.items():
                most = amount.max()
                change[a] += most
                change[b] -= most
        top: Vector = self.base + np.cumsum(change)[:-1]
        return top

    def load(self, choice: Sequence[int] | Ints) -> Vector:
        """What is live at every time point under a choice of the remaining nodes."""
        change = np.zeros(len(self.base) + 1)
        for n, uses in enumerate(self.uses):
            for (a, b), amount in uses.items():
                change[a] += amount[choice[n]]
                change[b] -= amount[choice[n]]
        total: Vector = self.base + np.cumsum(change)[:-1]
        return total

    def price(self, choice: Sequence[int] | Ints) -> float:
        """Cost under a choice of the remaining nodes, `offset` included."""
        total = self.offset
        for n in self.nodes():
            total += self.costs[n][choice[n]]
            total += sum(c[choice[n], choice[m]] for m, c in self.adj[n].items() if m > n)
        return float(total)
