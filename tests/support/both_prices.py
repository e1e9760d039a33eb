"""One plan priced twice: by the coefficients of the ILP and by reading its lowered program."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from costmodels.gathered import copy_gathered
from costmodels.memory import read_memory
from costmodels.pricing import instruction_seconds
from costmodels.program import Program
from costmodels.retiling import retile_gathered
from meshes import LogicalMesh
from planner.ilp import Problem
from planner.lowering.lower import lower
from planner.plan import Plan
from planner.sharding.formulate import Space


@dataclass(frozen=True)
class Price:
    seconds: float
    profile: np.ndarray  # bytes at every step of the schedule


def counted(program: Program, mesh: LogicalMesh) -> Program:
    """With those of a compiler's copies that the ILP counts."""
    tpu = mesh.chip.family == "tpu"
    return retile_gathered(copy_gathered(program, mesh), mesh) if tpu else program


def lowered_price(space: Space, plan: Plan) -> Price:
    program = counted(lower(space.flow, plan, space.resharder), space.mesh)
    return Price(serial_seconds(space, program), np.array(read_memory(program).profile, float))


def serial_seconds(space: Space, program: Program) -> float:
    return sum(n * instruction_seconds(space.mesh, i) for i, n in program.instructions())


def ilp_price(space: Space, problem: Problem, plan: Plan, steps: int) -> Price:
    """What `problem`, with a memory constraint at every one of `steps`, makes of `plan`."""
    taken = completed(problem, strategies(space, plan))
    seconds = sum(float(c[s]) for c, s in zip(problem.costs, taken, strict=True))
    seconds += sum(float(e.cost[taken[e.i], taken[e.j]]) for e in problem.edges)
    profile = np.zeros(steps)
    for u in problem.usages:
        profile[u.start : u.stop] += u.amount[taken[u.node]]
    return Price(seconds, profile)


def strategies(space: Space, plan: Plan) -> list[int]:
    """The position of the plan's decisions among the strategies of every node."""
    found = []
    for kind, name in space.keys:
        if kind == "op":
            found.append(space.choices[str(name)].index(plan.choices[str(name)]))
        else:
            home = space.flow.homes[int(name)]
            found.append(space.specs[home.id].index(plan.homes[home.tensor]))
    return found


def completed(problem: Problem, taken: list[int]) -> list[int]:
    """`taken` with the strategies of the pair nodes, which follow from both ends."""
    full = dict(enumerate(taken))
    allowed: dict[int, np.ndarray] = {}
    for e in problem.edges:
        for node, other, cost in ((e.j, e.i, e.cost), (e.i, e.j, e.cost.T)):
            if node >= len(taken) and other < len(taken):
                own = cost[full[other]]
                allowed[node] = allowed.get(node, 0.0) + own
    for node, cost in allowed.items():
        full[node] = int(np.argmin(cost))
    for node in range(len(taken), problem.size):
        full.setdefault(node, 0)
    return [full[i] for i in range(problem.size)]
