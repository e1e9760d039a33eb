"""Exact search on a presolved problem: linear relaxation, then branch and bound.

Only the order of the exact steps belongs here. Memory rows are added where a solution
overloads a time point: few points ever bind, and a solution of the relaxed program that
overloads none is an optimum of the whole one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.ilp import core
from planner.ilp.clock import Clock
from planner.ilp.linearise import Linear, linearise
from planner.ilp.milp import Answer, Milp
from planner.ilp.presolve import presolve
from planner.ilp.problem import Vector
from planner.ilp.profile import Profile
from planner.ilp.work import Infeasible, Ints, Work

UNLIMITED = Clock()
LARGEST_CORE = 0.85
"""A core that keeps more than this share of the columns is not worth presolving again."""
CORE_GROWTH = 5.0
INCUMBENTS = 1
"""After so many cores with a choice, the next one is wide enough for the proof."""
RELAXED_ROUNDS = 30
CAP_SHARE = 1e-4
"""Below this share of the cap the relaxation's cost is too small beside the dearest column."""
CAP_GROWTH = 100.0
"""Room between the relaxation's cost and the dearest column allowed; also how it grows."""
DEFAULT_NODES = 100_000
"""Branch-and-bound nodes of one run when no limit is given: the deterministic work limit."""


@dataclass(frozen=True)
class Search:
    """Result on the working problem; `choice` is indexed by node and fits.

    `status`: "optimal", "close" (as close to the bound as was asked for), "infeasible", or cut
    short by the clock or the work limit: "feasible" with a choice, "stopped" without.
    """

    status: str
    choice: Ints | None
    bound: float


@dataclass(frozen=True)
class Effort:
    """When to stop: by the clock, by branch-and-bound `nodes` of one run, or as soon as the
    cost is at most this share (`gap`) above the bound."""

    clock: Clock = UNLIMITED
    nodes: int | None = None
    gap: float = 0.0
    seed: int = 0

    def enough(self, upper: float, bound: float) -> bool:
        return upper < np.inf and upper - bound <= self.gap * abs(upper)


def search(
    work: Work, *, clock: Clock = UNLIMITED, nodes: int | None = None, gap: float = 0.0,
    start: Ints | None = None, upper: float = np.inf, seed: int = 0, grow: bool = True,
) -> Search:  # fmt: skip
    """Optimum of `work` or the best that the limits allow.

    With `upper` only choices of at most that cost are wanted: "infeasible" then means that
    there is none, "close" without a choice that none is cheaper by more than `gap`. `grow` False
    allows only a core that holds the proof at once.
    """
    effort = Effort(clock, nodes, gap, seed)
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
    root = _relax(model, profile, clock)
    bound = -np.inf if root is None else min(root.bound, _ceiling(model))
    if bound > upper:
        return Search("infeasible", None, bound)
    if root is not None:
        found = _by_cores(model, profile, root, effort, upper, grow)
        if found is not None:
            return found
    return _whole(model, profile, effort, start, upper, bound)


def _whole(
    model: Milp, profile: Profile, effort: Effort, start: Ints | None, upper: float, bound: float
) -> Search:
    """Branch and bound on all columns, the cap raised until the proof is complete."""
    work, linear = model.work, model.linear
    while True:
        found = _branch(model, profile, effort, start)
        # Without a forbidden column, or at a cost within the cap, the proof is complete.
        proven = found.status == "infeasible" and _ceiling(model) >= upper
        enough = found.choice is not None and found.bound <= linear.offset + model.cap
        if proven or enough or found.status == "stopped":
            return Search(found.status, found.choice, _valid(model, found, bound))
        if found.choice is None:
            model.set_cap(model.cap * CAP_GROWTH)
        else:
            model.set_cap(_cap(work.price(found.choice), linear.offset))


def _by_cores(
    model: Milp, profile: Profile, root: Answer, effort: Effort, upper: float, grow: bool
) -> Search | None:
    """Cores of growing width until one holds the proof; None where they stop being small."""
    work, linear = model.work, model.linear
    if root.columns is None or root.reduced is None:
        return None
    best = _integral(model, profile, root, upper)
    if best is not None:
        return Search("optimal", best, root.bound)
    slack = core.ROUNDING * abs(root.bound)
    width = core.first_width(linear, root.reduced, root.bound)
    proof = upper - root.bound + slack
    if not grow or core.share(linear, root.reduced, proof) <= LARGEST_CORE:
        width = proof
    bound = root.bound
    known = 0
    while True:
        # No wider than what a proof to the gap asked for takes.
        width = min(width, upper * (1 - effort.gap) - root.bound + slack)
        reach = root.bound + width
        if reach > _ceiling(model) or core.share(linear, root.reduced, width) > LARGEST_CORE:
            return None if best is None else _rest(model, profile, best, effort, bound)
        found = _core(work, linear, root.reduced, width, effort, upper)
        cost = np.inf if found.choice is None else work.price(found.choice)
        if cost <= upper:
            best, upper = found.choice, cost
        # Outside the core everything costs at least `reach`.
        inside = upper if found.status in ("optimal", "infeasible") else found.bound
        bound = min(max(bound, min(inside, reach)), upper)
        if found.status in ("stopped", "feasible"):
            return Search("stopped" if best is None else "feasible", best, bound)
        if upper <= reach and found.status != "close":
            if best is None:
                return Search("infeasible", None, max(bound, upper))
            return Search("optimal", best, upper)
        if effort.enough(upper, bound):
            return Search("close", best, bound)
        known += int(best is not None)
        width = np.inf if known == INCUMBENTS else width * CORE_GROWTH


def _integral(model: Milp, profile: Profile, root: Answer, upper: float) -> Ints | None:
    """The relaxation's choice, where it is one that fits at the relaxation's own cost."""
    if root.columns is None:
        return None
    choice = model.linear.choice(root.columns, model.work.original)
    cost = model.work.price(choice)
    close = cost - root.bound <= core.ROUNDING * abs(root.bound)
    return choice if close and cost <= upper and profile.fits(profile.load_of(choice)) else None


def _core(
    work: Work, linear: Linear, reduced: Vector, width: float, effort: Effort, upper: float
) -> Search:
    """Optimum of one core below `upper`, in choices of `work`."""
    try:
        part = core.cut(work, linear, reduced, width)
        presolve(part, out_of_time=effort.clock.over)
        found = search(
            part, clock=effort.clock, nodes=effort.nodes, gap=effort.gap, upper=upper,
            seed=effort.seed, grow=False,
        )  # fmt: skip
    except Infeasible:
        return Search("infeasible", None, np.inf)
    choice = None if found.choice is None else part.expand(found.choice)
    return Search(found.status, choice, found.bound)


def _rest(model: Milp, profile: Profile, best: Ints, effort: Effort, bound: float) -> Search:
    """The whole, from the best choice of a core."""
    upper = model.work.price(best)
    if effort.enough(upper, bound):
        return Search("close", best, bound)
    model.set_cap(_cap(upper, model.linear.offset))
    found = _whole(model, profile, effort, best, upper, bound)
    if found.choice is not None and model.work.price(found.choice) <= upper:
        return found
    status = "optimal" if found.status == "infeasible" else "feasible"
    return Search(status, best, upper if status == "optimal" else min(found.bound, upper))


def _cap(cost: float, offset: float) -> float:
    """What a column may cost if the whole may cost `cost` (with room for rounding)."""
    return (cost - offset) * (1 + 1e-9)


def _ceiling(model: Milp) -> float:
    """Up to this cost nothing is ruled out by the cap."""
    return np.inf if model.everything else model.linear.offset + model.cap


def _valid(model: Milp, found: Search, relaxed: float) -> float:
    """A bound of the whole problem: with a cap, nothing above it is ruled out."""
    ceiling = _ceiling(model)
    return max(min(found.bound, ceiling), min(relaxed, ceiling))


def _branch(model: Milp, profile: Profile, effort: Effort, start: Ints | None) -> Search:
    """Branch and bound under the model's cap, with rows added until the answer fits."""
    work, linear = model.work, model.linear
    while True:
        nodes = DEFAULT_NODES if effort.nodes is None else effort.nodes
        answer = model.solve(clock=effort.clock, nodes=nodes, gap=effort.gap, start=start)
        if answer.kind == "infeasible":
            return Search("infeasible", None, np.inf)
        choice = None if answer.columns is None else linear.choice(answer.columns, work.original)
        if choice is None:
            return Search("stopped", None, answer.bound)
        peaks = profile.peaks(profile.load_of(choice)).tolist()
        if not peaks:
            status = "feasible" if answer.kind == "stopped" else answer.kind
            return Search(status, choice, answer.bound)
        if answer.kind == "stopped" and effort.clock.over():
            return Search("stopped", None, answer.bound)
        if model.points.issuperset(peaks):
            model.exclude(choice)
        model.add_points(peaks)


def _relax(model: Milp, profile: Profile, clock: Clock) -> Answer | None:
    """Sets a first cap and adds the rows that fractional solutions overload.

    Returns the last relaxation solved, whose bound is valid up to the cap.
    """
    best: Answer | None = None
    for _ in range(RELAXED_ROUNDS):
        answer = model.relax(clock=clock)
        if answer.kind == "infeasible" and not model.everything:
            model.set_cap(model.cap * CAP_GROWTH)
            continue
        if answer.kind != "optimal" or answer.columns is None:
            return best
        above = answer.objective - model.linear.offset
        noise = core.ROUNDING * abs(answer.objective)
        if noise < above < model.cap * CAP_SHARE:
            # The dearest columns would drown the others in the tolerances: look closer.
            model.set_cap(max(above, model.cap * CAP_SHARE) * CAP_GROWTH)
            continue
        best = answer
        x = answer.columns[: profile.columns]
        new = set(profile.peaks(profile.load(x), 1e-6).tolist()) - model.points
        if not new:
            return best
        model.add_points(new)
    return best
