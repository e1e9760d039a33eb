"""The parts of the large search as laws against brute force: bounds, regrets, cores, moves."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from ilp_support import brute_force, from_seed, problems

from planner.ilp import Problem, conditioning, core, evaluate, exact, solve
from planner.ilp.lagrangian import Dual
from planner.ilp.linearise import linearise
from planner.ilp.milp import Milp
from planner.ilp.presolve import presolve
from planner.ilp.presolve_dominance import _worst_change, distinct, worst_change
from planner.ilp.profile import Profile
from planner.ilp.subproblem import restrict
from planner.ilp.work import Infeasible, Work

SEEDS = st.integers(0, 2**32 - 1)
ROUNDS = 12
SLACK = 1e-7
"""Bounds may exceed the optimum by this share: tolerances of the linear program."""


def clean(problem: Problem) -> Work:
    """The working problem without infinite node costs, or a rejected example."""
    work = Work(problem)
    try:
        for n in work.nodes():
            work.keep(n, np.flatnonzero(np.isfinite(work.costs[n])))
    except Infeasible:
        assume(False)
    return work


def every_choice(work: Work) -> Iterator[np.ndarray]:
    for picked in itertools.product(*(range(work.size(n)) for n in work.nodes())):
        choice = np.zeros(work.original, dtype=np.int64)
        choice[work.nodes()] = picked
        yield choice


def small(problem: Problem) -> bool:
    return bool(np.prod([float(len(c)) for c in problem.costs]) <= 2000)


def feasible_choices(work: Work) -> list[tuple[np.ndarray, float]]:
    found = []
    for choice in every_choice(work):
        cost = work.price(choice)
        load = work.load(choice)
        if np.isfinite(cost) and (not len(load) or load.max() <= work.limit * (1 + 1e-12)):
            found.append((choice, cost))
    return found


def margin(cost: float) -> float:
    return SLACK * max(1e-9, abs(cost))


@settings(max_examples=60, deadline=None)
@given(problems())
def test_the_dual_never_bounds_above_the_optimum_and_its_regrets_hold(problem: Problem) -> None:
    assume(small(problem))
    work = Work(problem)
    try:
        presolve(work, out_of_time=lambda: True)  # messages need edges that are arc consistent
    except Infeasible:
        assume(False)
    assume(work.nodes())
    dual = Dual(work)
    for _ in range(ROUNDS):
        dual.step()
    bound, regret = dual.regrets()
    parts = dual.split(regret)
    for choice, cost in feasible_choices(work):
        assert dual.bound <= cost + margin(cost)
        worst = max(parts[n][choice[n]] for n in work.nodes())
        assert bound + worst <= cost + margin(cost)
    if dual.choice is not None:
        assert evaluate(problem, work.expand(dual.choice)).fits


@settings(max_examples=60, deadline=None)
@given(problems())
def test_reduced_costs_bound_every_choice_outside_a_core(problem: Problem) -> None:
    assume(small(problem))
    work = clean(problem)
    linear = linearise(work)
    root = exact._relax(Milp(work, linear), Profile(work), exact.UNLIMITED)
    assume(root is not None)
    assert root is not None
    assert root.reduced is not None
    for choice, cost in feasible_choices(work):
        if linear.columns(choice) @ linear.cost + linear.offset > cost + margin(cost):
            pytest.fail("the columns of a choice must cost what the choice costs")
        dearest = root.reduced[linear.columns(choice) > 0].max(initial=0.0)
        # Columns dearer than the cap are not priced by the relaxation.
        if (linear.cost[linear.columns(choice) > 0] <= _cap_of(root, linear)).all():
            assert root.bound + dearest <= cost + margin(cost)


def _cap_of(root: exact.Answer, linear: exact.Linear) -> float:
    """A cap that the relaxation cannot have gone below."""
    return max(root.objective - linear.offset, 0.0)


@settings(max_examples=60, deadline=None)
@given(problems(), st.floats(0.0, 1.0))
def test_a_core_holds_exactly_the_choices_of_its_columns(problem: Problem, part: float) -> None:
    assume(small(problem))
    work = clean(problem)
    linear = linearise(work)
    rng = np.random.default_rng(int(part * 1e6))
    reduced = rng.random(len(linear.cost))
    inside = {
        tuple(choice): cost
        for choice, cost in feasible_choices(work)
        if (reduced[linear.columns(choice) > 0] <= part).all()
    }
    try:
        cut = core.cut(work, linear, reduced, part)
    except Infeasible:
        assert not inside
        return
    found = {tuple(cut.expand(choice)): cost for choice, cost in feasible_choices(cut)}
    assert found.keys() == inside.keys()
    assert all(found[c] == pytest.approx(inside[c], rel=1e-12, abs=1e-15) for c in found)


@settings(max_examples=80, deadline=None)
@given(SEEDS)
def test_grouped_comparison_equals_the_direct_one(seed: int) -> None:
    """Matrices as specs make them: few distinct rows and columns, shifted, some forbidden."""
    rng = np.random.default_rng(seed)
    base = np.floor(rng.exponential(20.0, (5, 4)))
    base[rng.random(base.shape) < 0.2] = np.inf
    cost = base[rng.integers(0, 5, 40)][:, rng.integers(0, 4, 30)]
    cost = cost + rng.integers(0, 9, (40, 1)) + rng.integers(0, 9, (1, 30))
    assert np.array_equal(worst_change(cost), _worst_change(cost))
    level, group, rows = distinct(cost)
    assert np.array_equal(rows[group] + level[:, None], cost)
    assert len(rows) < len(cost)


@settings(max_examples=60, deadline=None)
@given(problems(), SEEDS)
def test_a_conditioned_move_never_costs_more(problem: Problem, seed: int) -> None:
    work = Work(Problem(problem.costs, problem.edges))
    rng = np.random.default_rng(seed)
    choice = np.array([rng.integers(0, len(c)) for c in problem.costs], dtype=np.int64)
    steps, fixed = conditioning.order(work, rng)
    moved = conditioning.move(work, steps, fixed, choice, work.costs)
    assert work.price(moved) <= work.price(choice) + 1e-9
    assert all(moved[n] == choice[n] for n in fixed)


@settings(max_examples=60, deadline=None)
@given(problems(), SEEDS)
def test_a_part_prices_and_loads_like_the_whole(problem: Problem, seed: int) -> None:
    work = clean(problem)
    rng = np.random.default_rng(seed)
    choice = np.array([rng.integers(0, work.size(n)) for n in work.nodes()], dtype=np.int64)
    assume(np.isfinite(work.price(choice)))
    free = [n for n in work.nodes() if rng.random() < 0.6]
    part = restrict(work, choice, work.load(choice), free, None)
    found = np.array([rng.integers(0, part.work.size(k)) for k in range(len(free))], np.int64)
    merged = part.merge(choice, found)
    change = part.work.price(found) - part.cost
    assert work.price(choice) + change == pytest.approx(work.price(merged), rel=1e-9, abs=1e-9)
    assert part.work.load(found) == pytest.approx(work.load(merged), rel=1e-9, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(problems())
def test_neighbourhood_search_is_honest(problem: Problem) -> None:
    """Not proven to end at the optimum, but never better than it, and its bound never worse."""
    best = brute_force(problem)
    outcome = solve(problem, backend="lns", work_limit=20)
    if best is None:
        assert outcome.choice is None
        return
    if outcome.choice is not None:
        assert outcome.cost >= best.cost - margin(best.cost)
    assert outcome.bound <= best.cost + margin(best.cost)


def test_neighbourhood_search_is_deterministic() -> None:
    problem = from_seed(7)
    first = solve(problem, backend="lns", work_limit=20, seed=3)
    second = solve(problem, backend="lns", work_limit=20, seed=3)
    assert first.bound == second.bound
    assert np.array_equal(first.choice, second.choice)


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.floats(0.01, 0.5))
def test_neighbourhood_search_ends_at_the_gap_asked_for(seed: int, gap: float) -> None:
    """The first news that is good enough is the last."""
    told: list[bool] = []
    outcome = solve(
        from_seed(seed), backend="lns", work_limit=20, gap=gap,
        progress=lambda c, b: told.append(c < np.inf and c - b <= gap * abs(c)),
    )  # fmt: skip
    assert not any(told[:-1])
    if told and told[-1] and outcome.choice is not None:
        assert outcome.gap <= gap * (1 + 1e-9)
