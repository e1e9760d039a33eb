"""The ILP finds what enumerating all plans, lowering each whole and reading it, finds.

Random graphs with fan-out, storage that differs from use, partial sums that meet in a sum,
maxima, loops, donated states, dimensions that axes do not divide, and training steps whose memory
limit binds in the backward loop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cache
from math import inf

import pytest
from both_prices import Price
from brute_force import BruteForce, Leaf, TooMany
from fitting import cheapest_fitting
from random_graphs import batch_pins, random_graph, random_training_step
from random_plans import padded_ops

import meshes
from meshes import LogicalMesh
from planner.graph.core import Graph
from planner.plan import Plan
from planner.sharding.flow import Flow, build_flow
from planner.sharding.formulate import Space
from planner.sharding.spec import Spec, replicated

FEW = 700  # so many combinations are enumerated without leaving out any
PATIENCE = 400  # programs read before a search is given up
TIGHTER = (0.95, 0.85, 0.7)  # memory limits, as fractions of what the free optimum takes
TOLERANCE = 1e-9


@cache
def mesh(axes: int) -> LogicalMesh:
    if axes == 1:
        return meshes.logical(meshes.resolve("tpu-v3:1x1"), {"x": 2})
    return meshes.logical(meshes.resolve("tpu-v4:2x2x1"), {"x": 2, "y": 2})


def check(
    graph: Graph, on: LogicalMesh, pins: Mapping[str, Spec], uneven: bool = False
) -> Counter[str]:
    """Compares ILP and brute force without and with limits; what happened, for the record."""
    flow = build_flow(graph, pins, uneven=uneven)
    happened: Counter[str] = Counter()
    try:
        space, brute = Space(flow, on), BruteForce(flow, on)
    except TooMany:
        return Counter(skipped=1)
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

    cheapest = optimum(space, None)
    assert cheapest is not None
    plan, free = cheapest
    peak = free.profile.max()
    happened["padded"] += bool(padded_ops(flow, plan))
    binding = step_of(flow, int(free.profile.argmax()))
    for limit in (inf, *(int(peak * fraction) for fraction in TIGHTER)):
        found = optimum(space, limit)
        seconds = inf if found is None else found[1].seconds
        try:
            assert cheaper(limit, seconds) is None, limit
        except TooMany:
            happened["skipped"] += 1
            continue
        happened["infeasible" if found is None else "fits"] += 1
        happened["slower"] += free.seconds * (1 + TOLERANCE) < seconds < inf
        happened["bound in a backward loop"] += binding == "backward" and limit < inf
    return happened


def optimum(space: Space, limit: float | None) -> tuple[Plan, Price] | None:
    """The ILP's optimum; its lowered program must fit and cost what the ILP says."""
    found = cheapest_fitting(space, limit)
    if found is None:
        return None
    plan, price = found
    assert plan.proof.objective_s == pytest.approx(price.seconds, rel=TOLERANCE)
    assert limit is None or price.profile.max() <= limit
    return found


def step_of(flow: Flow, step: int) -> str:
    """The phase of the op at a schedule step inside a loop, else ""."""
    return next((s.op.phase for s in flow.sites.values() if s.step == step and s.times > 1), "")


def whole_outputs(graph: Graph) -> dict[str, Spec]:
    """Every device has to hold all of what the graph computes: memory is scarcer."""
    return {f"{name}@output": replicated(len(graph.tensors[name].shape)) for name in graph.outputs}


def over_graphs(seeds: range) -> None:
    happened: Counter[str] = Counter()
    for seed in seeds:
        graph = random_graph(seed)
        pins = whole_outputs(graph) if seed % 4 < 2 else {}
        happened += check(graph, mesh(1 + seed % 2), pins)
    assert happened["skipped"] < len(seeds), happened  # of four comparisons each
    assert happened["enumerated"] >= len(seeds) / 5, happened
    assert happened["slower"] >= len(seeds) / 8, happened
    assert not happened["padded"]


def over_uneven_graphs(seeds: range, axes: int) -> None:
    """Hardly a dimension that could be split evenly; optima pad where it pays."""
    happened: Counter[str] = Counter()
    for seed in seeds:
        graph = random_graph(seed, (1023, 2047, 8191, 1024))
        pins = whole_outputs(graph) if seed % 2 else {}
        happened += check(graph, mesh(axes), pins, uneven=True)
    assert happened["skipped"] < len(seeds), happened
    assert happened["padded"] >= len(seeds) / 4, happened


def over_training_steps(seeds: range) -> None:
    happened: Counter[str] = Counter()
    for seed in seeds:
        graph = random_training_step(seed)
        happened += check(graph, mesh(1), batch_pins(graph, seed))
    assert happened["fits"] >= len(seeds), happened
    assert happened["bound in a backward loop"] >= len(seeds) / 4, happened
    assert happened["slower"] >= len(seeds) / 8, happened


def test_random_graphs() -> None:
    over_graphs(range(50))


def test_random_graphs_with_padding() -> None:
    over_uneven_graphs(range(40), 1)


def test_training_steps_with_a_loop() -> None:
    over_training_steps(range(8, 16))


@pytest.mark.slow
def test_many_random_graphs() -> None:
    over_graphs(range(50, 160))


@pytest.mark.slow
def test_many_random_graphs_with_padding() -> None:
    over_uneven_graphs(range(40, 80), 2)


@pytest.mark.slow
def test_many_training_steps_with_a_loop() -> None:
    over_training_steps(range(16, 70))
