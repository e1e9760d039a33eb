"""Plain pricing of a choice: the referee of every solver, sharing no code with any of them.

Only a direct transcription of the problem's definition belongs here; nothing is compressed,
scaled or cached, so that an error in a solver cannot hide behind the same error here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.ilp.problem import Problem

RELATIVE_SLACK = 1e-9
"""Float sums of usages may exceed the limit by this share: three orders above rounding error
of adding 10^4 terms in float64, and 100 bytes in 100 GB."""


@dataclass(frozen=True)
class Evaluation:
    """`cost` (inf if a forbidden pair is chosen), highest usage `peak`, and whether it fits."""

    cost: float
    peak: float
    fits: bool


def evaluate(problem: Problem, choice: Sequence[int] | NDArray[np.int64]) -> Evaluation:
    """Price of choosing strategy `choice[n]` for every node `n`.

    Raises ValueError if `choice` has the wrong length or an index out of range.
    """
    picked = [int(s) for s in choice]
    if len(picked) != problem.size:
        raise ValueError(f"expected {problem.size} strategies, got {len(picked)}")
    for n, s in enumerate(picked):
        if not 0 <= s < len(problem.costs[n]):
            raise ValueError(
                f"node {n}: strategy {s} does not exist (it has {len(problem.costs[n])})"
            )
    terms = [float(problem.costs[n][s]) for n, s in enumerate(picked)]
    terms += [float(e.cost[picked[e.i], picked[e.j]]) for e in problem.edges]
    cost = math.inf if math.inf in terms else math.fsum(terms)
    peak = _peak(problem, picked)
    fits = problem.limit is None or peak <= problem.limit + abs(problem.limit) * RELATIVE_SLACK
    return Evaluation(cost, peak, fits and cost < math.inf)


def _peak(problem: Problem, picked: Sequence[int]) -> float:
    """Highest sum of live usages over time; 0 where nothing is ever live."""
    changes: dict[int, list[float]] = {}
    for u in problem.usages:
        if u.start >= u.stop:
            continue
        amount = float(u.amount[picked[u.node]])
        changes.setdefault(u.start, []).append(amount)
        changes.setdefault(u.stop, []).append(-amount)
    live, peak = 0.0, 0.0
    for t in sorted(changes):
        live += math.fsum(changes[t])
        peak = max(peak, live)
    return peak
