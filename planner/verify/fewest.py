"""Whether a compiler recovers a plan from its fewest annotations (planner.minimal).

Two programs go through the compiler, the one with all of the plan's shardings and the one that
leaves everything but a few annotations to it; what came out is compared. Neither says in which
order gradients are made: that is no annotation, and helps only where it is known how they lie.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from planner.export.jax_program import jax_program
from planner.export.placement import only, placement
from planner.minimal import MAX_GROWTH, Minimal
from planner.result import Result
from planner.verify.compare import Row, Thresholds, collective_rows, compiled_moves
from planner.verify.compile import Compiled, compile_program
from planner.verify.errors import BackendError
from planner.verify.hlo import HloError, parse
from planner.verify.hlo_reading import read
from planner.verify.normalise import Totals, normalised
from planner.verify.targets import backend_of


@dataclass(frozen=True)
class Recovered:
    """What a compiler makes of few annotations (the rows' first figures) and of all of them (their
    second). `collectives` are bytes by kind and axes, in the normal form."""

    model: str
    mesh: str
    found: Minimal
    few: Compiled
    every: Compiled
    rows: tuple[Row, ...]
    collectives: tuple[Row, ...]

    @property
    def judged(self) -> tuple[Row, ...]:
        return (*self.rows, *self.collectives)

    @property
    def ok(self) -> bool:
        """Whether both fit, and all judged figures are within their thresholds."""
        compiled = self.few.status == self.every.status == "compiled"
        return compiled and not any(r.exceeded for r in self.judged)


def recovered(
    result: Result, found: Minimal, backend: str | None, python: str | None, timeout_s: float
) -> Recovered:
    """Compiles both programs. Raises BackendError or ExportError."""
    goal = backend or backend_of(result.mesh)
    places = replace(placement(result), first={}), only(found.result, found.annotations)
    programs = (jax_program(result.model, result.mesh, place) for place in places)
    every, few = (compile_program(p, result.mesh, goal, python, timeout_s) for p in programs)
    rows = (Row("peak", "B", few.peak_bytes, every.peak_bytes, MAX_GROWTH),)
    collectives: tuple[Row, ...] = ()
    if few.status == every.status == "compiled":
        sizes = dict(result.mesh.axes)
        collectives = collective_rows(_moved(few, sizes), _moved(every, sizes), Thresholds())
    return Recovered(
        result.model.name, result.mesh.describe(), found, few, every, rows, collectives
    )


def _moved(compiled: Compiled, sizes: Mapping[str, int]) -> Totals:
    try:
        reading = read(parse(compiled.hlo), tuple(sizes.items()))
    except HloError as error:
        raise BackendError(f"cannot read what the compiler wrote: {error}") from error
    return normalised(compiled_moves(reading.collectives), sizes)
