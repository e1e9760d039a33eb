"""The plain formulation through PuLP: CBC and HiGHS on the unreduced problem.

All of PuLP lives in this module. It builds the program of `linearise` with every memory row,
no presolve of ours, so it serves as the portable fallback and as the yardstick of the rest.

PuLP's `status` says Optimal for a run that hit its time limit; only `sol_status` tells.
Names are rewritten by PuLP, so columns are called by dense numbers.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import pulp

from planner.ilp.exact import Search
from planner.ilp.linearise import Linear, Rows, linearise, memory_rows
from planner.ilp.milp import LARGEST_COST, MEMORY_SCALE
from planner.ilp.problem import Problem
from planner.ilp.work import Infeasible, Ints, Work

DEFAULT_NODES = 100_000


def search(
    problem: Problem, backend: str, time_limit: float | None, work_limit: int | None,
    warm_start: Sequence[int] | None, gap: float,
) -> Search:  # fmt: skip
    """Solves with PuLP's "cbc" or "highs"; `time_limit` includes building the model."""
    begin = time.monotonic()
    work = Work(problem)
    try:
        for n in work.nodes():
            work.keep(n, np.flatnonzero(np.isfinite(work.costs[n])))
    except Infeasible:
        return Search("infeasible", None, np.inf)
    linear = linearise(work)
    over = len(work.base) > 0 and work.base.max() > work.limit
    if over:
        return Search("infeasible", None, np.inf)
    model, columns = _build(work, linear)
    left = None if time_limit is None else time_limit - (time.monotonic() - begin)
    if left is not None and left <= 0:
        return Search("stopped", None, -np.inf)
    with _stdout_to_stderr():
        model.solve(_solver(backend, left, work_limit, gap))
    return _read(model, columns, work, linear, gap)


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """HiGHS prints a banner when PuLP constructs it; stdout belongs to the program's data."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def _build(work: Work, linear: Linear) -> tuple[pulp.LpProblem, list[pulp.LpVariable]]:
    """PuLP's model: objective in scaled units, then all rows."""
    model = pulp.LpProblem("sharding", pulp.LpMinimize)
    columns = [
        model.add_variable(
            f"v{k}", 0, 1, pulp.LpBinary if k < linear.binaries else pulp.LpContinuous
        )
        for k in range(len(linear.cost))
    ]
    largest = float(np.abs(linear.cost).max()) if len(linear.cost) else 0.0
    scale = LARGEST_COST / largest if largest > 0 else 1.0
    model += pulp.LpAffineExpression(
        [(v, float(c) * scale) for v, c in zip(columns, linear.cost, strict=True) if c != 0]
    )
    _add_rows(model, columns, linear.rows, "e")
    points = range(len(work.base))
    _add_rows(model, columns, memory_rows(work, linear, points, MEMORY_SCALE), "m")
    return model, columns


def _add_rows(
    model: pulp.LpProblem, columns: list[pulp.LpVariable], rows: Rows, prefix: str
) -> None:
    for k, (index, value) in enumerate(zip(rows.index, rows.value, strict=True)):
        if len(index) == 0:
            continue
        terms = [(columns[c], float(v)) for c, v in zip(index.tolist(), value, strict=True)]
        sense = pulp.LpConstraintEQ if rows.lower[k] == rows.upper[k] else pulp.LpConstraintLE
        model.addConstraint(
            pulp.LpConstraint(
                pulp.LpAffineExpression(terms), sense, f"{prefix}{k}", float(rows.upper[k])
            )
        )


def _solver(backend: str, left: float | None, work_limit: int | None, gap: float) -> pulp.LpSolver:
    nodes = DEFAULT_NODES if work_limit is None else work_limit
    if backend == "highs":
        return pulp.HiGHS(
            msg=False, gapRel=gap, timeLimit=left, threads=1, mip_max_nodes=nodes,
            mip_abs_gap=0.0,
        )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return pulp.PULP_CBC_CMD(
            msg=False, gapRel=gap, timeLimit=left, threads=1, maxNodes=nodes,
            options=["ratio 0", "allow 0"],
        )  # fmt: skip


def _read(
    model: pulp.LpProblem, columns: list[pulp.LpVariable], work: Work, linear: Linear, gap: float
) -> Search:
    """What `sol_status` really says; a solution is rounded to a choice.

    "Optimal" means up to `gap`, a share of the cost that the solver sees: without the offset.
    """
    if model.sol_status == pulp.LpSolutionInfeasible or model.status == pulp.LpStatusInfeasible:
        return Search("infeasible", None, np.inf)
    if model.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return Search("stopped", None, -np.inf)
    x = np.array([v.varValue or 0.0 for v in columns])
    choice: Ints = linear.choice(x, work.original)
    if model.sol_status == pulp.LpSolutionOptimal:
        cost = work.price(choice)
        status = "close" if gap > 0 else "optimal"
        return Search(status, work.expand(choice), cost - gap * (cost - linear.offset))
    return Search("feasible", work.expand(choice), -np.inf)
