"""What to save for the backward pass and how to shard, decided by one ILP, and planned.

Only the driver: constraints are added to the program of planner.sharding.saving until its
solution fits, then the step that saves what it says is planned like any other. Where lowered
programs need more memory than the ILP counts (copies that TPU compilers make), it is solved
again with so much less.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from math import inf

from meshes import LogicalMesh
from planner.graph.recompute import OPEN
from planner.ilp import Problem, quick_bound
from planner.model import Model
from planner.pins import in_loops
from planner.planning import (
    ENOUGH_GAP,
    EXACT_AXES,
    MEMORY_ROUNDS,
    NothingFits,
    Options,
    Planning,
    Unsolved,
    humps,
)
from planner.result import Result
from planner.sharding.saving import SavingProgram
from planner.weighting import GUESSES, PLAIN, Counts, Weights

ROUNDS = 3  # of finding out how much memory the ILP does not count
LESS = 0.03  # share of the limit by which it is lowered if what was decided does not fit


def is_possible(model: Model, mesh: LogicalMesh) -> bool:
    """Not for pipelines, nor for more axes than are planned exactly."""
    axes = sum(size > 1 for _, size in mesh.axes)
    return model.pipeline is None and axes <= EXACT_AXES


def weightings(mesh: LogicalMesh) -> list[Weights]:
    """How communication may count on this chip: it may be hidden or not."""
    return list(GUESSES) if mesh.chip.overlap else [PLAIN]


def saving_bound(model: Model, mesh: LogicalMesh, enough_s: float = inf) -> float:
    """Seconds that no plan's serial time falls below, whatever it saves (see surrogate_bound)."""
    planning = _planning(model, mesh, Options())
    return quick_bound(planning.problem(None, planning.counts(PLAIN)), enough_s)


def plan_saving(model: Model, mesh: LogicalMesh, options: Options, weights: Weights) -> Result:
    """The plan of what the ILP saves if communication counts so much.

    Raises NothingFits, Unsolved or PinError.
    """
    planning = _planning(model, mesh, replace(options, least_memory=False))
    best: Result | None = None
    tried: set[tuple[str, ...]] = set()
    for _ in range(ROUNDS):
        saved = planning.saved(weights)
        if saved is None or saved in tried:
            break
        tried.add(saved)
        plain = Planning(
            model.decided(saved), mesh, planning.options, planning.annotation, planning.progress
        )
        plain.clock = planning.clock
        try:
            result = plain.best()
        except NothingFits:
            planning.slack += LESS * planning.target
            continue
        except Unsolved:  # the best so far is the answer
            break
        if best is None or result.timing.step_time_s < best.timing.step_time_s:
            best = result
        if plain.slack <= planning.slack:
            break
        planning.slack = plain.slack
    if best is None:
        planning.check_time()
        raise NothingFits("nothing fits")
    return best


def _planning(model: Model, mesh: LogicalMesh, options: Options) -> SavingPlanning:
    annotation = in_loops(model.constraints, model.members)
    return SavingPlanning(model.decided(OPEN), mesh, options, annotation, None)


class SavingPlanning(Planning):
    """Planning of an open step (see planner.graph.recompute), as far as what it saves."""

    @cached_property
    def program(self) -> SavingProgram:
        return SavingProgram(self.space)

    def problem(self, limit: float | None, counts: Counts) -> Problem:
        return self.program.problem(limit, self.active, counts)

    def saved(self, weights: Weights) -> tuple[str, ...] | None:
        """What the fastest plan within the memory saves; None if none fits."""
        counts = self.counts(weights)
        limit = self.target - self.slack
        for _ in range(MEMORY_ROUNDS):
            outcome = self.solved(limit if self.active else None, counts, ENOUGH_GAP)
            if outcome.status == "infeasible":
                return None
            if outcome.choice is None:
                break
            strategy = outcome.choice.tolist()
            profile = self.program.profile(strategy).round().astype(int).tolist()
            new = set(humps(profile, limit)) - set(self.active)
            if not new:
                return self.program.saved(strategy)
            self.active = sorted({*self.active, *new})
        raise Unsolved("what to save was not decided")
