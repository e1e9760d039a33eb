"""Predictions checked against XLA's own compilers, which run without the hardware.

    verification = verify(result)          # the machine's own compiler
    print(text(verification)); exit code = 0 if verification.ok else 1

One way through: the plan becomes a JAX program (planner.export.jax_program), `compile` runs the
compiler in a process of its own, `hlo` and `hlo_reading` read what came out, `compare` compares.
"""

from __future__ import annotations

from planner.export.jax_ops import ExportError
from planner.export.jax_program import result_program
from planner.result import Result
from planner.verify.compare import Thresholds, Verification, compare
from planner.verify.compile import DEFAULT_TIMEOUT_S, Compiled, compile_program
from planner.verify.errors import BackendError
from planner.verify.fewest import Recovered, recovered
from planner.verify.hlo import HloError, parse
from planner.verify.hlo_reading import read
from planner.verify.show import document, recovered_document, recovered_text, text
from planner.verify.targets import BACKENDS, backend_of


def verify(
    result: Result, backend: str | None = None, python: str | None = None,
    thresholds: Thresholds | None = None, timeout_s: float = DEFAULT_TIMEOUT_S,
) -> Verification:  # fmt: skip
    """Compiles the plan's own program and compares. `backend`: the machine's own if None;
    `python`: interpreter of an environment that has it.

    Raises BackendError (no such compiler here, or it failed) or ExportError.
    """
    compiled = compile_result(result, backend, python, timeout_s)
    return compare_compiled(result, compiled, thresholds)


def compare_compiled(
    result: Result, compiled: Compiled, thresholds: Thresholds | None = None
) -> Verification:
    """A plan against what a compiler has made of it. Raises BackendError."""
    reading = None
    if compiled.status == "compiled":
        try:
            reading = read(parse(compiled.hlo), result.mesh.axes)
        except HloError as error:
            raise BackendError(f"cannot read what the compiler wrote: {error}") from error
    return compare(result, compiled, reading, thresholds or Thresholds())


def compile_result(
    result: Result, backend: str | None = None, python: str | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> Compiled:  # fmt: skip
    """Only the compiler's word, for memory verdicts."""
    goal = backend or backend_of(result.mesh)
    return compile_program(result_program(result), result.mesh, goal, python, timeout_s)


__all__ = [
    "BACKENDS", "BackendError", "Compiled", "ExportError", "Recovered", "Thresholds",
    "Verification", "compare_compiled", "compile_result", "document", "recovered",
    "recovered_document", "recovered_text", "text", "verify",
]  # fmt: skip
