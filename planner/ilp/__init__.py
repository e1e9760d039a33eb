"""The sharding ILP: one problem class, one `solve`.

Re-exports only. `problem` and `evaluate` define what is solved; `presolve`, `elimination`,
`exact` and their helpers solve it; `pulp_model` holds everything that speaks PuLP.
"""

from __future__ import annotations

from planner.ilp.evaluate import Evaluation, evaluate
from planner.ilp.problem import Edge, Outcome, Problem, Usage
from planner.ilp.quick_bound import quick_bound
from planner.ilp.solver import BACKENDS, Look, solve

__all__ = [
    "BACKENDS", "Edge", "Evaluation", "Look", "Outcome", "Problem", "Usage", "evaluate",
    "quick_bound", "solve",
]  # fmt: skip
