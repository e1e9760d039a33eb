"""The ILP finds what enumerating all plans, lowering each whole and reading it, finds.

Random graphs with fan-out, storage that differs from use, partial sums that meet in a sum,
maxima, loops, donated states and training steps whose memory limit binds in the backward loop.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from math import inf

import pytest
from brute_force import BruteForce, Leaf, TooMany
from both_prices import Price
from fitting import cheapest_fitting
from random_graphs import random_graph, random_training_step

import meshes
from meshes import LogicalMesh
from planner.graph.core import Graph
from planner.sharding.flow import Flow, build_flow
from planner.sharding.formulate import Space

GRAPHS, STEPS = 140, 70
FEW = 700  # so many combinations are enumerated without leaving out any
PATIENCE = 300  # programs read before a search is given up
TIGHTER = (0.999, 0.8, 0.6)  # memory limits, as fractions of what the free optimum takes
TOLERANCE = 1e-9


@cache
def mesh(axes: int) -> LogicalMesh:
    if axes == 1:
        return meshes.logical(meshes.resolve("tpu-v3:1x1"), {"x": 2})
    return meshes.logical(meshes.resolve("tpu-v4:2x2x1"), {"x": 2, "y": 2})


def check(graph: Graph, on: LogicalMesh) -> Counter[str]:
    """Compares ILP and brute force without and with limits; what happened, for the record."""
    flow = build_flow(graph, {})
    space, brute = Space(flow, on), BruteForce(flow, on)
    happened: Counter[str] = Counter()
    if brute.plans <= FEW:
        happened["enumerated"] += 1
        leaves = list(brute.every())
    else:
        happened["searched"] += 1
        leaves = None

    def cheaper(limit: float, seconds: float) -> Leaf | None:
        """A plan that fits and is faster than what the ILP found (inf: than nothing)."""
        if leaves is None:
            return brute.best(limit, PATIENCE, seconds * (1 - TOLERANCE))
        fitting = [leaf for leaf in leaves if leaf.peak_bytes <= limit]
        fitting = [leaf for leaf in fitting if leaf.seconds < seconds * (1 - TOLERANCE)]
        return min(fitting, key=lambda leaf: leaf.seconds, default=None)

    free = optimum(space, None)
    assert free is not None
    peak = free.profile.max()
    binding = step_of(flow, int(free.profile.argmax()))
    for limit in (inf, *(int(peak * fraction) for fraction in TIGHTER)):
        found = optimum(space, limit)
        seconds = inf if found is None else found.seconds
        try:
            assert cheaper(limit, seconds) is None, limit
        except TooMany:
            happened["skipped"] += 1
            continue
        happened["infeasible" if found is None else "fits"] += 1
        happened["slower"] += free.seconds * (1 + TOLERANCE) < seconds < inf
        happened["bound in a backward loop"] += binding == "backward" and limit < inf
    return happened


def optimum(space: Space, limit: float | None) -> Price | None:
    """The lowered program of the ILP's optimum, which must fit and cost what the ILP says."""
    found = cheapest_fitting(space, limit)
    if found is None:
        return None
    plan, price = found
    assert plan.proof.objective_s == pytest.approx(price.seconds, rel=TOLERANCE)
    assert limit is None or price.profile.max() <= limit
    return price


def step_of(flow: Flow, step: int) -> str:
    """The phase of the op at a schedule step inside a loop, else ""."""
    return next((s.op.phase for s in flow.sites.values() if s.step == step and s.times > 1), "")


def test_random_graphs() -> None:
    happened: Counter[str] = Counter()
    for seed in range(GRAPHS):
        happened += check(random_graph(seed), mesh(1 + seed % 2))
    assert happened["skipped"] < GRAPHS / 2, happened  # of four comparisons each
    assert happened["enumerated"] >= GRAPHS / 5, happened
    assert happened["slower"] >= GRAPHS / 5, happened


def test_training_steps_with_a_loop() -> None:
    happened: Counter[str] = Counter()
    for seed in range(STEPS):
        happened += check(random_training_step(seed), mesh(1))
    assert happened["skipped"] < STEPS / 2, happened
    assert happened["bound in a backward loop"] >= STEPS, happened
    assert happened["slower"] >= STEPS / 5, happened
