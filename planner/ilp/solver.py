"""`solve`: one signature for every way of solving the sharding ILP.

Only the choice of the way, and turning its result into an `Outcome`, belong here. Whatever a
solver claims, the cost in the outcome is the plain evaluation of its choice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from planner.ilp import elimination, exact, pulp_model
from planner.ilp.anytime import Anytime
from planner.ilp.clock import Clock
from planner.ilp.evaluate import evaluate
from planner.ilp.presolve import presolve
from planner.ilp.problem import Outcome, Problem
from planner.ilp.work import Infeasible, Work

BACKENDS = ("auto", "cbc", "highs", "lns")
FREE_NODES = 5_000
"""Above this many nodes with a limit the memory-free optimum is not worth its time: in every
contest problem the limit binds."""
PRESOLVE_SHARE = 0.2
"""Part of a time limit that presolve may take."""
Ints = NDArray[np.int64]
Progress = Callable[[float, float], None]


@dataclass(frozen=True)
class Look:
    """What may end a search early: a question that is asked of every better choice that costs at
    most the share `gap` above the bound, whether to go on; and a bound of `hopeless`."""

    gap: float
    worth: Callable[[Outcome], bool]
    hopeless: float = np.inf


def solve(
    problem: Problem, *, backend: str = "auto", time_limit: float | None = None,
    work_limit: int | None = None, seed: int = 0, warm_start: Sequence[int] | None = None,
    gap: float = 0.0, progress: Progress | None = None, look: Look | None = None,
) -> Outcome:  # fmt: skip
    """Chooses a strategy per node: least cost, usages within the limit at all times.

    `time_limit` is in seconds; without it the search stops on `work_limit` (branch-and-bound
    nodes), which gives the same result every time. A cost proven to be at most the share `gap`
    above the least is enough ("feasible"). `progress` gets incumbent and bound. `look` may end
    the search early ("feasible"); backends other than "auto" and "lns" don't ask.
    Raises ValueError for an unknown backend or a malformed problem.
    """
    check_backend(backend)
    check(problem)
    clock = Clock.of(time_limit)
    found = search(
        problem, backend, clock, work_limit, seed, warm_start, gap, progress, look=look
    )
    return outcome_of(problem, found, warm_start, clock)


def search(
    problem: Problem, backend: str, clock: Clock, work_limit: int | None, seed: int,
    warm_start: Sequence[int] | None, gap: float, progress: Progress | None, pair: bool = False,
    look: Look | None = None,
) -> exact.Search:  # fmt: skip
    """The backend's own result, not yet priced. The problem must have passed `check`.

    With `pair` a second process may help where there is a time limit.
    """
    if backend in ("cbc", "highs"):
        seconds = clock.left() if clock.limited else None
        return pulp_model.search(problem, backend, seconds, work_limit, warm_start, gap)
    try:
        return _reduced(problem, backend, clock, work_limit, seed, gap, progress, pair, look)
    except Infeasible:
        return exact.Search("infeasible", None, np.inf)


def check_backend(backend: str) -> None:
    """Raises ValueError unless `backend` is known."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: expected one of {', '.join(BACKENDS)}")


def check(problem: Problem) -> None:
    """Raises ValueError at the first shape, index or value that makes no sense."""
    sizes = [len(c) for c in problem.costs]
    for n, c in enumerate(problem.costs):
        if np.ndim(c) != 1 or np.isnan(c).any() or (c == -np.inf).any():
            raise ValueError(f"node {n}: costs must be a vector of numbers above -inf")
    for k, e in enumerate(problem.edges):
        if not (0 <= e.i < len(sizes) and 0 <= e.j < len(sizes)):
            raise ValueError(f"edge {k}: no such node ({e.i}, {e.j})")
        if np.shape(e.cost) != (sizes[e.i], sizes[e.j]):
            expected = (sizes[e.i], sizes[e.j])
            raise ValueError(f"edge {k}: expected shape {expected}, got {np.shape(e.cost)}")
    for k, u in enumerate(problem.usages):
        if not 0 <= u.node < len(sizes) or np.shape(u.amount) != (sizes[u.node],):
            raise ValueError(f"usage {k}: node or shape does not match the problem")
        if not (np.isfinite(u.amount).all() and np.min(u.amount, initial=0.0) >= 0):
            raise ValueError(f"usage {k}: amounts must be finite and not negative")


def _reduced(
    problem: Problem, backend: str, clock: Clock, work_limit: int | None, seed: int, gap: float,
    progress: Progress | None, pair: bool, look: Look | None,
) -> exact.Search:  # fmt: skip
    """Presolve, then elimination where it is enough, else the anytime search."""
    work = Work(problem)
    presolve(work, out_of_time=clock.share(PRESOLVE_SHARE).over)
    if backend == "auto":
        free = _without_memory(work, clock)
        if free is not None and free.choice is not None and evaluate(problem, free.choice).fits:
            return free
    report = None if progress is None else (lambda cost, bound, _: progress(cost, bound))
    anytime = Anytime(
        work, clock, seed, work_limit, gap, report=report, try_exact=backend == "auto", pair=pair
    )
    if look is not None:
        anytime.look_gap, anytime.look = look.gap, partial(_worth, problem, clock, look)
        anytime.hopeless = look.hopeless
    return anytime.run()


def _worth(problem: Problem, clock: Clock, look: Look, choice: Ints, bound: float) -> bool:
    found = exact.Search("feasible", choice, bound)
    return look.worth(outcome_of(problem, found, None, clock))


def _without_memory(work: Work, clock: Clock) -> exact.Search | None:
    """The optimum ignoring the limit, where elimination can do it: a bound, often the answer."""
    free = work
    if len(work.base):
        if work.original > FREE_NODES:
            return None
        free = work.without_memory()
        presolve(free, out_of_time=clock.over)
    steps = elimination.plan_order(free)
    if steps is None:
        return None
    value, choice = elimination.run(free, steps)
    if value == np.inf:
        raise Infeasible("every choice has a forbidden pair")
    found = choice if free is work else free.expand(choice)
    return exact.Search("optimal", work.expand(found), value)


def outcome_of(
    problem: Problem, found: exact.Search, warm_start: Sequence[int] | None, clock: Clock
) -> Outcome:
    """Believes only what evaluation confirms; an unbeaten warm start is the answer."""
    choice = found.choice
    cost, peak = np.inf, 0.0
    if choice is not None:
        priced = evaluate(problem, choice)
        choice, cost = (choice, priced.cost) if priced.fits else (None, np.inf)
        peak = priced.peak
    if warm_start is not None and found.status != "optimal":
        warm = evaluate(problem, warm_start)
        if warm.fits and warm.cost < cost:
            choice, cost, peak = np.array(warm_start, dtype=np.int64), warm.cost, warm.peak
    seconds = clock.seconds()
    if found.status == "infeasible" and choice is None:
        return Outcome("infeasible", None, np.inf, np.inf, seconds)
    late = clock.limited and clock.over()
    status = found.status
    if status != "optimal" or choice is None:
        status = "time_limit" if late or choice is None else "feasible"
    bound = min(found.bound, cost)
    return Outcome(status, choice, float(cost), float(bound), seconds, peak)
