"""Where a model is cut into stages.

One stack of layers that divides evenly is cut into equal runs, with what stands before it in the
first and what stands behind it in the last stage, as frameworks do. Any other row of units is cut
so that the slowest stage is as fast as can be (dynamic programming over cuts).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from meshes import LogicalMesh
from planner.graph.core import Graph, Loop, Op
from planner.pipelining.pieces import PipelineError, Unit, units
from planner.sharding.choices import OpChoices
from planner.sharding.formulate import choice_seconds


def stage_starts(
    graph: Graph, stages: int, mesh: LogicalMesh, uneven: bool = False
) -> tuple[int, ...]:
    """The first unit of every stage; `mesh` is what shards a stage, `uneven` if need be."""
    row = units(graph)
    if len(row) < stages:
        raise PipelineError(
            f"the model cannot be cut into {stages} stages: it has {len(row)} parts, iterations of "
            "repeats and what stands between them"
        )
    layers = [i for i, unit in enumerate(row) if unit.turn >= 0]
    stacks = {row[i].start for i in layers}
    if len(stacks) == 1 and len(layers) % stages == 0:
        each = len(layers) // stages
        return (0, *(layers[0] + each * s for s in range(1, stages)))
    seconds = {
        unit.start: unit_seconds(graph, unit, mesh, uneven) for unit in row if unit.turn <= 0
    }
    return balanced([seconds[unit.start] for unit in row], stages)


def balanced(weights: Sequence[float], stages: int) -> tuple[int, ...]:
    """The starts of `stages` runs, none empty, whose heaviest is as light as possible.

    best[s][n]: the heaviest of s runs over the first n weights, at best; = min over the start k
    of the last run of max(best[s - 1][k], total of weights k … n).
    """
    total = [0.0, *accumulate(weights)]
    count = len(weights)
    best = [total]  # of one run
    where: list[list[int]] = [[0] * (count + 1)]
    for s in range(1, stages):
        row, starts = [float("inf")] * (count + 1), [0] * (count + 1)
        for n in range(s + 1, count + 1):
            for k in range(n - 1, s - 1, -1):
                last = total[n] - total[k]
                heaviest = max(best[-1][k], last)
                if heaviest < row[n]:
                    row[n], starts[n] = heaviest, k
                if last >= row[n]:  # a longer last run is heavier still
                    break
        best.append(row)
        where.append(starts)
    found, n = [], count
    for s in range(stages - 1, -1, -1):
        n = where[s][n]
        found.append(n)
    return tuple(reversed(found))


def unit_seconds(graph: Graph, unit: Unit, mesh: LogicalMesh, uneven: bool) -> float:
    """Seconds of a unit's forward pass, every op under its cheapest choice."""
    tensors = graph.all_tensors()

    def op_seconds(op: Op) -> float:
        choices = OpChoices(op, mesh.axes, uneven).choices
        return float(choice_seconds(op, choices, tensors, mesh).min())

    seconds = 0.0
    for node in graph.nodes[unit.start : unit.stop]:
        if isinstance(node, Loop):
            seconds += sum(op_seconds(op) * times for op, times in node.body.walk())
        else:
            seconds += op_seconds(node)
    return seconds
