"""Every part on its own keeps the optimum: each reduction, elimination, exact search."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ilp_support import brute_force, from_seed, problems, random_problem

from planner.ilp import Edge, Problem, elimination, evaluate, exact, messages, quick_bound
from planner.ilp.presolve import presolve
from planner.ilp.presolve_dominance import drop_dominated, forbid_pairs
from planner.ilp.presolve_edges import drop_infinite, reduce_edge
from planner.ilp.presolve_elimination import eliminate
from planner.ilp.work import Infeasible, Work


def all_edges(work: Work) -> None:
    for i in work.nodes():
        for j in list(work.adj[i]):
            if work.present[i] and work.present[j] and j in work.adj[i]:
                reduce_edge(work, i, j)


def all_nodes(rule: Callable[[Work, int], bool]) -> Callable[[Work], None]:
    def apply(work: Work) -> None:
        for n in work.nodes():
            if work.present[n]:
                rule(work, n)

    return apply


def all_time(work: Work) -> None:
    work.trim_time()
    work.drop_crowded()


RULES: dict[str, Callable[[Work], None]] = {
    "infinite": all_nodes(drop_infinite),
    "edges": all_edges,
    "dominance": all_nodes(drop_dominated),
    "pairs": all_nodes(forbid_pairs),
    "elimination": all_nodes(eliminate),
    "time": all_time,
    "presolve": presolve,
}


def solve_rest(problem: Problem, work: Work) -> float:
    """Optimum through branch and bound alone, priced on the original; inf if infeasible."""
    all_nodes(drop_infinite)(work)
    found = exact.search(work)
    if found.choice is None:
        return np.inf
    priced = evaluate(problem, work.expand(found.choice))
    assert priced.fits
    assert found.bound == pytest.approx(priced.cost, rel=1e-7, abs=1e-12)
    return priced.cost


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=120, deadline=None)
@given(problem=problems())
def test_a_reduction_keeps_the_optimum(rule: str, problem: Problem) -> None:
    best = brute_force(problem)
    try:
        work = Work(problem)
        RULES[rule](work)
        cost = solve_rest(problem, work)
    except Infeasible:
        cost = np.inf
    expected = np.inf if best is None else best.cost
    assert cost == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_columns_belong_to_the_reported_optimum() -> None:
    """Seen with HiGHS 1.16: warm from a relaxation, it returned another solution's columns."""
    problem = from_seed(205431)
    work = Work(problem)
    RULES["elimination"](work)
    assert solve_rest(problem, work) == 113.0


@pytest.mark.parametrize("seed", [2782968267, 249243378])
def test_cores_grow_from_reduced_costs_that_are_all_zero(seed: int) -> None:
    problem = from_seed(seed)
    best = brute_force(problem)
    assert solve_rest(problem, Work(problem)) == (np.inf if best is None else best.cost)


def test_a_cap_below_the_known_cost_proves_nothing() -> None:
    """A relaxation that costs nothing before memory has rows must not shut out dear columns."""
    problem = from_seed(356198604)
    work = Work(problem)
    RULES["time"](work)
    assert solve_rest(problem, work) == 408.0


@settings(max_examples=120, deadline=None)
@given(problems())
def test_search_alone_is_brute_force(problem: Problem) -> None:
    best = brute_force(problem)
    try:
        cost = solve_rest(problem, Work(problem))
    except Infeasible:
        cost = np.inf
    assert cost == pytest.approx(np.inf if best is None else best.cost, rel=1e-9, abs=1e-15)


@settings(max_examples=100, deadline=None)
@given(problems())
def test_elimination_is_brute_force_without_limit(problem: Problem) -> None:
    free = Problem(problem.costs, problem.edges)
    best = brute_force(free)
    work = Work(free)
    steps = elimination.plan_order(work)
    assert steps is not None
    value, choice = elimination.run(work, steps)
    assert value == pytest.approx(np.inf if best is None else best.cost, rel=1e-12)
    if best is not None:
        assert evaluate(free, work.expand(choice)).cost == pytest.approx(best.cost, rel=1e-12)


@settings(max_examples=100, deadline=None)
@given(problems(), st.integers(0, 2**32 - 1))
def test_work_prices_and_loads_like_the_referee(problem: Problem, seed: int) -> None:
    """Any choice left by presolve means a full choice of the same cost and the same fit."""
    try:
        work = Work(problem)
        presolve(work)
    except Infeasible:
        return
    rng = np.random.default_rng(seed)
    choice = np.zeros(problem.size, dtype=np.int64)
    for n in work.nodes():
        choice[n] = rng.integers(0, work.size(n))
    priced = evaluate(problem, work.expand(choice))
    if work.price(choice) == np.inf:  # a pair that presolve forbids because another is no worse
        return
    assert work.price(choice) == pytest.approx(priced.cost, rel=1e-12, abs=1e-15)
    load = work.load(choice)
    fits = load.max(initial=0.0) <= work.limit
    assert (fits and priced.cost < np.inf) == priced.fits


@given(st.integers(0, 2**32 - 1))
def test_quick_bound_never_exceeds_the_optimum(seed):
    problem = random_problem(np.random.default_rng(seed), tightness=None)
    best = brute_force(problem)
    bound = quick_bound(problem)
    if best is None:
        assert bound > 0
    else:
        assert bound <= best.cost * (1 + 1e-9) + 1e-9


def test_quick_bound_of_a_chain_is_exact():
    rng = np.random.default_rng(1)
    costs = tuple(rng.integers(0, 9, 4).astype(float) for _ in range(5))
    edges = tuple(Edge(i, i + 1, rng.integers(0, 9, (4, 4)).astype(float)) for i in range(4))
    problem = Problem(costs, edges)
    assert quick_bound(problem) == pytest.approx(brute_force(problem).cost)


@given(st.integers(0, 2**32 - 1))
def test_matrices_one_by_one_or_together_send_the_same(seed):
    """Some of each: the same bound whichever way a matrix is minimised over."""
    problem = random_problem(np.random.default_rng(seed), nodes=9, edges=16, tightness=None)
    found = []
    for cells in (1, 6, 10**9):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(messages, "LARGE_CELLS", cells)
            found.append(quick_bound(problem))
    assert found[1:] == pytest.approx(found[:1] * 2)


@given(st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_a_bound_that_is_enough_is_a_bound(seed, share):
    problem = random_problem(np.random.default_rng(seed), nodes=9, edges=16, tightness=None)
    whole = quick_bound(problem)
    found = quick_bound(problem, enough=share * whole)
    assert share * whole <= found or found == pytest.approx(whole)
    assert found <= whole + 1e-9 * abs(whole) or whole == np.inf
