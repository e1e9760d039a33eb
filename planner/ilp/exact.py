"""Exact search on a presolved problem: linear relaxation, then branch and bound.

Only the order of the exact steps belongs here. Memory rows are added where a solution
overloads a time point: few points ever bind, and a solution of the relaxed program that
overloads none is an optimum of the whole one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.ilp.clock import Clock
from planner.ilp.linearise import linearise
from planner.ilp.milp import Milp
from planner.ilp.profile import Profile
from planner.ilp.work import Ints, Work

UNLIMITED = Clock()
RELAXED_ROUNDS = 30
CAP_SHARE = 1e-4
"""Below this share of the cap the relaxation's cost is too small beside the dearest column."""
CAP_GROWTH = 100.0
"""Room between the relaxation's cost and the dearest column allowed; also how it grows."""
DEFAULT_NODES = 100_000
"""Branch-and-bound nodes of one run when no limit is given: the deterministic work limit."""


@dataclass(frozen=True)
class Search:
    """Result on the working problem; `choice` is indexed by node and fits."""

    status: str
    choice: Ints | None
    bound: float


def search(
    work: Work, *, clock: Clock = UNLIMITED, nodes: int | None = None,
    start: Ints | None = None, upper: float = np.inf, seed: int = 0,
) -> Search:  # fmt: skip
    """Optimum of `work` or the best that the limits allow.

    With `upper` only choices of at most that cost are wanted: "infeasible" then means that
    there is none.
    """
    linear = linearise(work)
    profile = Profile(work)
    if not linear.nodes:
        if not profile.fits(work.base):
            return Search("infeasible", None, np.inf)
        return Search("optimal", np.zeros(work.original, dtype=np.int64), work.offset)
    model = Milp(work, linear, seed=seed)
    if start is not None and profile.fits(profile.load_of(start)):
        model.set_cap(_cap(work.price(start), linear.offset))
    if np.isfinite(upper):
        if upper < linear.offset:
            return Search("infeasible", None, linear.offset)
        model.set_cap(_cap(upper, linear.offset))
    bound = _relax(model, profile, clock)
    if bound > upper:
        return Search("infeasible", None, bound)
    while True:
        found = _branch(model, profile, clock, nodes, start)
        # Without a forbidden column, or at a cost within the cap, the proof is complete.
        proven = found.status == "infeasible" and (model.everything or np.isfinite(upper))
        enough = found.choice is not None and found.bound <= linear.offset + model.cap
        if proven or enough or found.status == "stopped":
            return Search(found.status, found.choice, _valid(model, found, bound))
        if found.choice is None:
            model.set_cap(model.cap * CAP_GROWTH)
        else:
            model.set_cap(_cap(work.price(found.choice), linear.offset))


def _cap(cost: float, offset: float) -> float:
    """What a column may cost if the whole may cost `cost` (with room for rounding)."""
    return (cost - offset) * (1 + 1e-9)


def _valid(model: Milp, found: Search, relaxed: float) -> float:
    """A bound of the whole problem: with a cap, nothing above it is ruled out."""
    ceiling = np.inf if model.everything else model.linear.offset + model.cap
    return max(min(found.bound, ceiling), min(relaxed, ceiling))


def _branch(
    model: Milp, profile: Profile, clock: Clock, nodes: int | None, start: Ints | None
) -> Search:
    """Branch and bound under the model's cap, with rows added until the answer fits."""
    work, linear = model.work, model.linear
    while True:
        answer = model.solve(
            clock=clock, nodes=DEFAULT_NODES if nodes is None else nodes, start=start
        )
        if answer.kind == "infeasible":
            return Search("infeasible", None, np.inf)
        choice = None if answer.columns is None else linear.choice(answer.columns, work.original)
        if choice is None:
            return Search("stopped", None, answer.bound)
        peaks = profile.peaks(profile.load_of(choice)).tolist()
        if not peaks:
            status = "optimal" if answer.kind == "optimal" else "feasible"
            return Search(status, choice, answer.bound)
        if answer.kind == "stopped" and clock.over():
            return Search("stopped", None, answer.bound)
        if model.points.issuperset(peaks):
            model.exclude(choice)
        model.add_points(peaks)


def _relax(model: Milp, profile: Profile, clock: Clock) -> float:
    """Sets a first cap and adds the rows that fractional solutions overload.

    Returns the bound reached, valid up to the cap.
    """
    bound = -np.inf
    for _ in range(RELAXED_ROUNDS):
        answer = model.relax(clock=clock)
        if answer.kind == "infeasible" and not model.everything:
            model.set_cap(model.cap * CAP_GROWTH)
            continue
        if answer.kind != "optimal" or answer.columns is None:
            return bound
        above = answer.objective - model.linear.offset
        if above < model.cap * CAP_SHARE:
            # The dearest columns would drown the others in the tolerances: look closer.
            model.set_cap(max(above, model.cap * CAP_SHARE) * CAP_GROWTH)
            continue
        bound = answer.bound
        x = answer.columns[: profile.columns]
        new = set(profile.peaks(profile.load(x), 1e-6).tolist()) - model.points
        if not new:
            return bound
        model.add_points(new)
    return bound
