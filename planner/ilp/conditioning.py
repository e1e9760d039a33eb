"""Very large moves without limit: fix a few hundred nodes, optimise all others exactly.

Only this conditioned elimination belongs here. Nodes are eliminated in the order of least
table; where every table would be too large, a well-connected node is fixed at its present
strategy instead. The others then take their joint optimum (memory enters through prices only),
so the priced cost never rises. Which nodes get fixed is drawn at random each time.
"""

from __future__ import annotations

import heapq
import math

import numpy as np
from numpy.typing import NDArray

from planner.ilp.elimination import spread
from planner.ilp.problem import Vector
from planner.ilp.work import Work

Ints = NDArray[np.int64]
Steps = list[tuple[int, tuple[int, ...]]]

TABLE = 1e5
"""Cells of the largest table: about a millisecond of NumPy."""
NOISE = 30.0
"""Scale of the draw against log-size × degree, which is 20 to 100 for the nodes in question."""


def order(work: Work, rng: np.random.Generator) -> tuple[Steps, list[int]]:
    """(node, neighbours in its table) in order of elimination, and the nodes fixed."""
    near = {n: set(work.adj[n]) for n in work.nodes()}
    logs = {n: math.log(work.size(n)) for n in near}
    weight = {n: logs[n] + sum(logs[m] for m in near[n]) for n in near}
    draw = rng.gumbel(size=work.original) * NOISE
    heap = [(w, n) for n, w in weight.items()]
    heapq.heapify(heap)
    steps: Steps = []
    fixed: list[int] = []
    core: list[tuple[float, int]] | None = None
    while heap:
        w, n = heapq.heappop(heap)
        if n not in near or w != weight[n]:
            continue
        if w <= math.log(TABLE):
            scope = near.pop(n)
            for m in scope:
                near[m].discard(n)
                near[m] |= scope
                near[m].discard(m)
            steps.append((n, tuple(sorted(scope))))
        else:
            heapq.heappush(heap, (w, n))
            if core is None:
                core = [(-logs[m] * len(near[m]) - draw[m], m) for m in near]
                heapq.heapify(core)
            gone = heapq.heappop(core)[1]
            if gone not in near:
                continue
            scope = near.pop(gone)
            for m in scope:
                near[m].discard(gone)
            fixed.append(gone)
        for m in scope:
            weight[m] = logs[m] + sum(logs[k] for k in near[m])
            heapq.heappush(heap, (weight[m], m))
    held = set(fixed)
    return [(n, tuple(m for m in scope if m not in held)) for n, scope in steps], fixed


def move(work: Work, steps: Steps, fixed: list[int], choice: Ints, own: list[Vector]) -> Ints:
    """`choice` with every node of `steps` replaced by the joint optimum; `own[n]` are costs."""
    held = set(fixed)
    rank = {n: k for k, (n, _) in enumerate(steps)}
    messages: dict[int, list[tuple[tuple[int, ...], NDArray[np.float64]]]] = {}
    best: list[Ints] = []
    for k, (n, scope) in enumerate(steps):
        axes = (n, *scope)
        cost = own[n]
        for m in work.adj[n]:
            if m in held:
                cost = cost + work.adj[n][m][:, choice[m]]
        table = cost.reshape((-1,) + (1,) * len(scope))
        for m, edge in work.adj[n].items():
            if m not in held and rank[m] > k:
                table = table + spread(edge, (n, m), axes)
        for near, message in messages.pop(n, ()):
            table = table + spread(message, near, axes)
        best.append(table.argmin(axis=0))
        if scope:
            heir = min(scope, key=rank.__getitem__)
            messages.setdefault(heir, []).append((scope, table.min(axis=0)))
    moved = choice.copy()
    for (n, scope), arg in zip(reversed(steps), reversed(best), strict=True):
        moved[n] = arg[tuple(moved[m] for m in scope)]
    return moved
