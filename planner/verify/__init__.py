"""Predictions checked against XLA's own compilers, which run without the hardware.

    verification = verify(result)          # the machine's own compiler
    print(text(verification)); exit code = 0 if verification.ok else 1

One way through: the plan becomes a JAX program (planner.export.jax_program), `compile` runs the
compiler in a process of its own, `hlo` and `hlo_reading` read what came out, `compare` compares.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from costmodels.pipeline import PipelineProgram
from planner.export.jax_ops import ExportError
from planner.export.jax_program import planned_source, result_program
from planner.result import Result
from planner.verify.compare import Thresholds, Verification, compare
from planner.verify.compile import DEFAULT_TIMEOUT_S, Compiled, compile_program
from planner.verify.errors import BackendError
from planner.verify.fewest import Recovered, recovered
from planner.verify.hlo import HloError, parse
from planner.verify.hlo_reading import read
from planner.verify.show import (
    document,
    recovered_document,
    recovered_text,
    stages_document,
    stages_text,
    text,
)
from planner.verify.stages import VerifiedStage, VerifiedStages, stages_alone
from planner.verify.targets import BACKENDS, backend_of


def verify(
    result: Result, backend: str | None = None, python: str | None = None,
    thresholds: Thresholds | None = None, timeout_s: float = DEFAULT_TIMEOUT_S,
) -> Verification:  # fmt: skip
    """Compiles the plan's own program and compares. `backend`: the machine's own if None;
    `python`: interpreter of an environment that has it.

    Raises BackendError (no such compiler here, or it failed) or ExportError.
    """
    source, goal = planned_source(result), backend or backend_of(result.mesh)
    compiled = compile_program(source.text, result.mesh, goal, python, timeout_s)
    return replace(compare_compiled(result, compiled, thresholds), note=source.note)


def verify_stages(
    result: Result, backend: str | None = None, python: str | None = None,
    thresholds: Thresholds | None = None, timeout_s: float = DEFAULT_TIMEOUT_S,
) -> VerifiedStages:  # fmt: skip
    """The same for a pipeline whose stages have programs of their own, one after the other."""
    if not isinstance(result.program, PipelineProgram) or result.model.pipeline is None:
        raise ValueError(f"{result.model.name} is one program")
    goal, found = backend or backend_of(result.mesh), []
    for alone in stages_alone(result):
        compiled = compile_program(alone.source.text, alone.result.mesh, goal, python, timeout_s)
        compared = compare_compiled(alone.result, compiled, thresholds, alone.held_bytes)
        found.append(VerifiedStage(alone, replace(compared, note=alone.source.note)))
    pipeline = result.model.pipeline
    return VerifiedStages(
        result.model.name, result.mesh.describe(), pipeline.schedule, pipeline.axis, tuple(found)
    )


def compare_compiled(
    result: Result, compiled: Compiled, thresholds: Thresholds | None = None, held_bytes: int = 0
) -> Verification:
    """A plan against what a compiler has made of it (`held_bytes` as in `compare`). Raises
    BackendError."""
    reading = None
    if compiled.status == "compiled":
        try:
            reading = read(parse(compiled.hlo), result.mesh.axes)
        except HloError as error:
            raise BackendError(f"cannot read what the compiler wrote: {error}") from error
    return compare(result, compiled, reading, thresholds or Thresholds(), held_bytes)


def compile_result(
    result: Result, backend: str | None = None, python: str | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> Compiled:  # fmt: skip
    """Only the compiler's word."""
    goal = backend or backend_of(result.mesh)
    return compile_program(result_program(result), result.mesh, goal, python, timeout_s)


def compile_parts(result: Result, python: str | None = None) -> Iterator[tuple[Compiled, int]]:
    """For memory verdicts: the compiler's word on a plan's program, or on every kind of stage
    with a program of its own, and what the schedule adds to its peak (`Alone.held_bytes`)."""
    if not isinstance(result.program, PipelineProgram):
        yield compile_result(result, python=python), 0
        return
    goal = backend_of(result.mesh)
    for alone in stages_alone(result):
        found = compile_program(alone.source.text, alone.result.mesh, goal, python)
        yield found, alone.held_bytes


__all__ = [
    "BACKENDS", "BackendError", "Compiled", "ExportError", "Recovered", "Thresholds",
    "Verification", "VerifiedStages", "compare_compiled", "compile_parts", "compile_result",
    "document", "recovered", "recovered_document", "recovered_text", "stages_document",
    "stages_text", "text", "verify", "verify_stages",
]  # fmt: skip
