"""Brute force and generators of small problems for the solver's tests."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from planner.ilp import Edge, Evaluation, Problem, Usage, evaluate


def brute_force(problem: Problem) -> Evaluation | None:
    """The best choice by pricing all of them; None if nothing fits."""
    sizes = [len(c) for c in problem.costs]
    every = np.indices(sizes).reshape(len(sizes), -1)
    cost = np.zeros(every.shape[1])
    for n, own in enumerate(problem.costs):
        cost += own[every[n]]
    for e in problem.edges:
        cost += e.cost[every[e.i], every[e.j]]
    if problem.limit is not None:
        for t in {u.start for u in problem.usages}:
            live = [u for u in problem.usages if u.start <= t < u.stop]
            load = sum((u.amount[every[u.node]] for u in live), np.zeros(len(cost)))
            cost = np.where(load > problem.limit, np.inf, cost)
    best = int(np.argmin(cost))
    return evaluate(problem, every[:, best]) if np.isfinite(cost[best]) else None


def random_problem(
    rng: np.random.Generator,
    *,
    nodes: int = 6,
    strategies: int = 4,
    edges: int = 8,
    tightness: float | None = 0.4,
    integer: bool = True,
) -> Problem:
    """Edges are a mixture of dense, function-like (0/inf), spec-like and sparse matrices."""
    sizes = rng.integers(1, strategies + 1, nodes)
    costs = tuple(_numbers(rng, (s,), integer) for s in sizes)
    found = []
    for _ in range(edges):
        i, j = rng.integers(0, nodes, 2)
        found.append(Edge(int(i), int(j), _matrix(rng, sizes[i], sizes[j], integer)))
    usages = []
    for n in range(nodes):
        for _ in range(rng.integers(0, 3)):
            start = int(rng.integers(0, 12))
            amount = np.floor(rng.exponential(10.0, sizes[n]))
            usages.append(Usage(n, start, start + int(rng.integers(0, 6)), amount))
    limit = None
    if tightness is not None:
        probe = Problem(costs, tuple(found), tuple(usages), np.inf)
        highs = evaluate(probe, [int(rng.integers(0, s)) for s in sizes]).peak
        limit = float(np.floor(highs * (0.5 + tightness)))
    return Problem(costs, tuple(found), tuple(usages), limit)


def _numbers(rng: np.random.Generator, shape: tuple[int, ...], integer: bool) -> np.ndarray:
    if integer:
        return np.floor(rng.exponential(20.0, shape))
    return rng.exponential(1.0, shape) * 10.0 ** rng.integers(-7, 2, shape)


def _matrix(rng: np.random.Generator, rows: int, columns: int, integer: bool) -> np.ndarray:
    kind = rng.integers(0, 5)
    dense = _numbers(rng, (rows, columns), integer)
    if kind == 0:
        return dense
    if kind == 1:  # a function of the rows
        cost = np.full((rows, columns), np.inf)
        cost[np.arange(rows), rng.integers(0, columns, rows)] = 0.0
        return cost
    if kind == 2:  # few specs on both sides
        return dense[rng.integers(0, rows, rows)][:, rng.integers(0, columns, columns)]
    if kind == 3:  # some forbidden pairs
        return np.where(rng.random((rows, columns)) < 0.3, np.inf, dense)
    return _numbers(rng, (rows, 1), integer) + _numbers(rng, (1, columns), integer)


def problems() -> st.SearchStrategy[Problem]:
    """Problems of 1 to 8 nodes; everything follows from one drawn seed, so that sizes are
    spread evenly (drawn sizes would mostly be tiny)."""
    return st.builds(from_seed, st.integers(0, 2**32 - 1))


def from_seed(seed: int) -> Problem:
    rng = np.random.default_rng(seed)
    nodes = int(rng.integers(1, 9))
    return random_problem(
        rng,
        nodes=nodes,
        edges=int(rng.integers(0, 2 * nodes + 1)),
        integer=bool(rng.integers(0, 2)),
        tightness=None if rng.random() < 0.2 else float(rng.uniform(0.0, 0.6)),
    )
