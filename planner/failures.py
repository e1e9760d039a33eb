"""What an exception means for the user: an exit code and a message, never a traceback.

Imported only once something has failed. Anything unknown is a fault of this program.
"""

from __future__ import annotations

from meshes import MeshError
from planner.errors import InputError
from planner.export.jax_ops import ExportError
from planner.export.stamp import Stale
from planner.graph.builder import GraphError
from planner.ilp.contest_reader import BadProblem
from planner.modelfile import ModelErrors, render
from planner.pins import PinError
from planner.planning import Unsolved
from planner.sharding.formulate import Unsatisfiable
from planner.verify.errors import BackendError

NO, BAD_INPUT, CRASHED = 1, 2, 3


def describe(error: Exception) -> tuple[int, str]:
    """(exit code, message) of an error that ended a command."""
    if isinstance(error, ModelErrors):
        return BAD_INPUT, render(error.diagnostics)
    if isinstance(error, Stale):
        return NO, f"{error}\nrefresh with: {error.refresh}"
    if isinstance(error, InputError):
        hint = f"\nhint: {error.hint}" if error.hint else ""
        return BAD_INPUT, f"error: {error.message}{hint}"
    if isinstance(error, MeshError | BadProblem | PinError | GraphError | Unsatisfiable):
        return BAD_INPUT, f"error: {error}"
    if isinstance(error, ExportError):
        return BAD_INPUT, f"error: {error}"
    if isinstance(error, BackendError):
        # What the user can mend comes with a hint; a compiler that failed does not.
        return (BAD_INPUT if error.hint else CRASHED), f"error: {error}"
    if isinstance(error, Unsolved):
        return CRASHED, f"error: {error}; give a longer --time-limit"
    return CRASHED, f"internal error: {type(error).__name__}: {error}"
