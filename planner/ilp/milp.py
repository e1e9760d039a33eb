"""The linearised program in HiGHS, through highspy's array interface.

Only the conversation with HiGHS belongs here: options, tolerances, rows added between runs,
statuses. Building a large program through PuLP's expression objects takes longer than solving
the presolved one, so the exact search passes arrays; `pulp_model` is the portable twin.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import highspy
import numpy as np
from numpy.typing import NDArray

from planner.ilp.clock import Clock
from planner.ilp.linearise import Linear, Rows, memory_rows
from planner.ilp.problem import Vector
from planner.ilp.work import Work

Ints = NDArray[np.int64]

LARGEST_COST = 1e6
"""Costs are scaled so that the largest usable one is this: HiGHS works with an absolute dual
tolerance of 1e-7, so thirteen orders of magnitude stay visible."""
MEMORY_SCALE = 1e3
"""The limit in scaled units: with a feasibility tolerance of 1e-7 a row can be exceeded by a
share of 1e-10 at most; the caller checks by plain evaluation."""
TOLERANCE = 1e-7
AGREE = 1e-6
"""Columns and reported objective may differ by this share (tolerances times many columns)."""
CLOSED = 1e-9
"""A smaller share of the cost between it and the bound is rounding."""
POLL_S = 0.05
"""How often a running HiGHS is asked whether somebody wants to stop."""
UNLIMITED = Clock()


@dataclass(frozen=True)
class Answer:
    """`kind`: optimal, close (within the gap asked for), infeasible, or stopped; `columns` is None
    where nothing was found."""

    kind: str
    columns: Vector | None
    objective: float
    bound: float
    reduced: Vector | None = None
    """Reduced cost of every column, where a relaxation was solved to the end."""


class QuietHighs(highspy.Highs):
    """HiGHS that does not print its banner: stdout belongs to the program's data.

    The base class registers callbacks in its constructor, which prints unless output is off.
    """

    def enableCallbacks(self) -> None:
        self.setOptionValue("output_flag", False)
        super().enableCallbacks()


class Milp:
    """One program in HiGHS; costs come back in the problem's own unit."""

    def __init__(self, work: Work, linear: Linear, *, threads: int = 1, seed: int = 0) -> None:
        self.work = work
        self.linear = linear
        self.points: set[int] = set()
        self.highs = QuietHighs()
        self._options(threads, seed)
        self.cap = np.inf
        self.scale = 1.0
        self._pass_model()
        self.set_cap(float(linear.cost.max(initial=0.0)))

    def _options(self, threads: int, seed: int) -> None:
        options: dict[str, bool | int | float | str] = {
            "output_flag": False, "threads": threads, "random_seed": seed,
            "parallel": "off", "mip_rel_gap": 0.0, "mip_abs_gap": TOLERANCE,
            "primal_feasibility_tolerance": TOLERANCE, "mip_feasibility_tolerance": TOLERANCE,
            "dual_feasibility_tolerance": TOLERANCE,
            # Its presolve would take half of the time and finds little after ours.
            "presolve": "off",
        }  # fmt: skip
        for name, value in options.items():
            self.highs.setOptionValue(name, value)

    def _pass_model(self) -> None:
        linear = self.linear
        start, index, value, lower, upper = linear.rows.flat()
        lp = highspy.HighsLp()
        lp.num_col_ = len(linear.cost)
        lp.num_row_ = len(lower)
        lp.col_cost_ = linear.cost * self.scale
        lp.col_lower_ = np.zeros(lp.num_col_)
        lp.col_upper_ = np.ones(lp.num_col_)
        lp.row_lower_ = lower
        lp.row_upper_ = upper
        lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        lp.a_matrix_.start_ = start
        lp.a_matrix_.index_ = index
        lp.a_matrix_.value_ = value
        self.highs.passModel(lp)

    def set_cap(self, cap: float) -> None:
        """Forbids every column dearer than `cap` and scales the others to LARGEST_COST.

        Valid for solutions that cost at most `linear.offset + cap`.
        """
        self.cap = cap
        self.scale = LARGEST_COST / cap if cap > 0 else 1.0
        cost = self.linear.cost
        usable = cost <= cap
        count = len(cost)
        every = np.arange(count, dtype=np.int32)
        scaled = np.where(usable, cost * self.scale, LARGEST_COST)
        self.highs.changeColsCost(count, every, scaled)
        self.highs.changeColsBounds(count, every, np.zeros(count), usable.astype(np.float64))

    @property
    def everything(self) -> bool:
        """Whether no column is forbidden by the cap."""
        return bool((self.linear.cost <= self.cap).all())

    def add_points(self, points: Iterable[int]) -> None:
        """Adds memory rows for the time points that have none yet."""
        new = sorted(set(points) - self.points)
        self.points.update(new)
        self.add_rows(memory_rows(self.work, self.linear, new, MEMORY_SCALE))

    def add_rows(self, rows: Rows) -> None:
        start, index, value, lower, upper = rows.flat()
        if len(lower) == 0:
            return
        self.highs.addRows(
            len(lower), lower, upper, len(index),
            start[:-1].astype(np.int32), index.astype(np.int32), value,
        )  # fmt: skip

    def exclude(self, choice: Ints) -> None:
        """Cuts off exactly one choice (for one that rounding alone calls feasible)."""
        index = np.array([self.linear.first[n] + choice[n] for n in self.linear.nodes])
        row = Rows()
        row.add(index, np.ones(len(index)), -np.inf, len(index) - 1.0)
        self.add_rows(row)

    def relax(self, *, clock: Clock = UNLIMITED) -> Answer:
        """The linear relaxation; HiGHS keeps its basis between calls."""
        self._integrality(False)
        self._run(clock)
        return self._answer(mip=False)

    def solve(
        self, *, clock: Clock = UNLIMITED, nodes: int | None = None, gap: float = 0.0,
        start: Ints | None = None,
    ) -> Answer:  # fmt: skip
        """Branch and bound. `nodes` is the deterministic work limit; a choice at most the share
        `gap` above the bound is enough."""
        # After a relaxation HiGHS 1.16 can return columns that do not belong to the optimum it
        # reports (its objective is right, the columns are another solution's): start afresh.
        self.highs.clearSolver()
        self._integrality(True)
        if nodes is not None:
            self.highs.setOptionValue("mip_max_nodes", nodes)
        # HiGHS does not see the offset, which is part of the cost.
        close = gap * max(self.linear.offset, 0.0) * self.scale
        self.highs.setOptionValue("mip_rel_gap", gap)
        self.highs.setOptionValue("mip_abs_gap", max(TOLERANCE, close))
        if start is not None:
            solution = highspy.HighsSolution()
            solution.col_value = list(self.linear.columns(start))
            self.highs.setSolution(solution)
        self._run(clock)
        answer = self._answer(mip=True)
        open_part = answer.objective - answer.bound
        if answer.kind == "optimal" and gap > 0 and open_part > CLOSED * abs(answer.objective):
            return replace(answer, kind="close")
        return answer

    def _run(self, clock: Clock) -> None:
        """Runs in a thread of its own, so that a signal is heard and stops the run."""
        self.highs.setOptionValue("time_limit", self.highs.getRunTime() + clock.left())
        if not clock.limited:
            self.highs.run()
            return
        thread = self.highs.startSolve()
        while thread.is_alive():
            thread.join(POLL_S)
            if clock.stop.asked:
                self.highs.cancelSolve()
                thread.join()

    def _unscaled(self, value: float) -> float:
        return value / self.scale + self.linear.offset

    def _integrality(self, on: bool) -> None:
        count = self.linear.binaries
        kind = highspy.HighsVarType.kInteger if on else highspy.HighsVarType.kContinuous
        self.highs.changeColsIntegrality(
            count, np.arange(count, dtype=np.int32), np.full(count, int(kind), dtype=np.uint8)
        )

    def _answer(self, *, mip: bool) -> Answer:
        status = self.highs.getModelStatus()
        info = self.highs.getInfo()
        if status == highspy.HighsModelStatus.kInfeasible:
            return Answer("infeasible", None, np.inf, np.inf)
        found = info.primal_solution_status == 2  # kSolutionStatusFeasible
        columns = np.array(self.highs.getSolution().col_value) if found else None
        objective = self._unscaled(info.objective_function_value) if found else np.inf
        agree = columns is not None and self._agrees(columns, info.objective_function_value)
        if status == highspy.HighsModelStatus.kOptimal and agree:
            if not mip:
                return Answer("optimal", columns, objective, objective, self._reduced())
            bound = self._unscaled(info.mip_dual_bound)
            return Answer("optimal", columns, objective, min(bound, objective))
        bound = self._unscaled(info.mip_dual_bound) if mip else -np.inf
        objective = objective if agree else np.inf
        return Answer("stopped", columns, objective, bound)

    def _reduced(self) -> Vector:
        return np.array(self.highs.getSolution().col_dual) / self.scale

    def _agrees(self, columns: Vector, objective: float) -> bool:
        """Whether the columns have the objective that HiGHS reports for them."""
        cost = np.where(self.linear.cost <= self.cap, self.linear.cost * self.scale, LARGEST_COST)
        return bool(abs(cost @ columns - objective) <= AGREE * max(1.0, abs(objective)))
