"""Bucket elimination: the exact optimum of a problem without limit, by dynamic programming.

Only the usage-free problem belongs here. Nodes are eliminated in the order of least table;
each table [neighbours] holds the best cost over the eliminated node, and its argmin. Cost and
memory grow with the largest table, hence the cell limits.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from planner.ilp.problem import Vector
from planner.ilp.work import Ints, Work

LARGEST_TABLE = 20_000_000
"""Cells of one table: 160 MB of float64."""
ALL_TABLES = 200_000_000
"""Cells of all tables: they are work as well as the memory of the argmins."""


@dataclass(frozen=True)
class Step:
    """Eliminating `node`: the table has axes (node, *scope)."""

    node: int
    scope: tuple[int, ...]


def plan_order(
    work: Work, *, largest: int = LARGEST_TABLE, total: int = ALL_TABLES
) -> list[Step] | None:
    """Greedy least-table order, or None where a table exceeds the limits."""
    near = {n: set(work.adj[n]) for n in work.nodes()}
    sizes = {n: work.size(n) for n in near}
    weight = {n: prod((sizes[m] for m in near[n]), start=sizes[n]) for n in near}
    steps: list[Step] = []
    while near:
        node = min(weight, key=lambda n: (weight[n], n))
        total -= weight[node]
        if weight[node] > largest or total < 0:
            return None
        scope = near.pop(node)
        del weight[node]
        for m in scope:
            near[m].discard(node)
            near[m] |= scope - {m}
        for m in scope:
            weight[m] = prod((sizes[k] for k in near[m]), start=sizes[m])
        steps.append(Step(node, tuple(sorted(scope))))
    return steps


def run(work: Work, steps: list[Step]) -> tuple[float, Ints]:
    """Least cost (`offset` included; inf if nothing is allowed) and a choice of that cost."""
    buckets: dict[int, list[tuple[tuple[int, ...], NDArray[np.float64]]]] = {}
    rank = {step.node: at for at, step in enumerate(steps)}
    best: list[NDArray[np.int64]] = []
    value = work.offset
    for at, step in enumerate(steps):
        axes = (step.node, *step.scope)
        table = _table(work, step, axes, rank, at, buckets.pop(step.node, []))
        least = table.min(axis=0)
        best.append(table.argmin(axis=0).astype(np.int32))
        if not step.scope:
            value += float(least)
            continue
        heir = min(step.scope, key=lambda m: rank[m])
        buckets.setdefault(heir, []).append((step.scope, least))
    choice = np.zeros(work.original, dtype=np.int64)
    for step, arg in zip(reversed(steps), reversed(best), strict=True):
        choice[step.node] = arg[tuple(choice[m] for m in step.scope)]
    return value, choice


def _table(
    work: Work, step: Step, axes: tuple[int, ...], rank: dict[int, int], at: int,
    messages: list[tuple[tuple[int, ...], Vector]],
) -> NDArray[np.float64]:  # fmt: skip
    """Everything that involves the node and has not been summed before."""
    table = np.zeros([work.size(m) for m in axes])
    table += spread(work.costs[step.node], (step.node,), axes)
    for m, cost in work.adj[step.node].items():
        if rank[m] > at:
            table += spread(cost, (step.node, m), axes)
    for scope, message in messages:
        table += spread(message, scope, axes)
    return table


def spread(array: Vector, own: tuple[int, ...], axes: tuple[int, ...]) -> NDArray[np.float64]:
    """`array` with axes `own` as one that broadcasts over `axes`."""
    order = sorted(range(len(own)), key=lambda k: axes.index(own[k]))
    moved = np.transpose(array, order)
    shape = [1] * len(axes)
    for k, size in zip(order, moved.shape, strict=True):
        shape[axes.index(own[k])] = size
    return moved.reshape(shape)
