"""`solve` against brute force, and its promises about status, bound and input."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ilp_support import brute_force, problems, random_problem

from planner.ilp import Edge, Look, Outcome, Problem, Usage, evaluate, solve

# Mostly ours: the others take a hundred times as long.
EXACT_BACKENDS = st.sampled_from(["auto"] * 18 + ["highs", "cbc"])


def check_against_brute_force(problem: Problem, backend: str) -> None:
    best = brute_force(problem)
    outcome = solve(problem, backend=backend)
    if best is None:
        assert outcome.status == "infeasible"
        assert outcome.choice is None
        return
    assert outcome.status == "optimal"
    assert outcome.cost == pytest.approx(best.cost, rel=1e-9, abs=1e-15)
    assert outcome.bound <= outcome.cost
    priced = evaluate(problem, outcome.choice)
    assert priced.fits
    assert priced.cost == outcome.cost


@settings(max_examples=400, deadline=None)
@given(problems())
def test_auto_is_brute_force(problem: Problem) -> None:
    check_against_brute_force(problem, "auto")


@settings(max_examples=200, deadline=None)
@given(problems(), st.sampled_from([0.02, 0.2, 1.0]), EXACT_BACKENDS)
def test_a_gap_that_is_asked_for_is_kept(problem: Problem, gap: float, backend: str) -> None:
    best = brute_force(problem)
    outcome = solve(problem, gap=gap, backend=backend)
    if best is None:
        assert outcome.status == "infeasible"
        return
    assert outcome.choice is not None
    assert evaluate(problem, outcome.choice).fits
    assert outcome.bound <= best.cost * (1 + 1e-9)
    assert best.cost <= outcome.cost * (1 + 1e-9)
    assert outcome.cost - outcome.bound <= gap * outcome.cost * (1 + 1e-9)
    assert outcome.status in ("optimal", "feasible")
    if outcome.status == "optimal":
        assert outcome.cost == pytest.approx(best.cost, rel=1e-9, abs=1e-15)


@settings(max_examples=15, deadline=None)
@given(problems())
def test_highs_through_pulp_is_brute_force(problem: Problem) -> None:
    check_against_brute_force(problem, "highs")


@settings(max_examples=10, deadline=None)
@given(problems())
def test_cbc_through_pulp_is_brute_force(problem: Problem) -> None:
    check_against_brute_force(problem, "cbc")


@pytest.mark.parametrize("seed", range(12))
def test_twelve_nodes_with_binding_memory(seed: int) -> None:
    problem = random_problem(
        np.random.default_rng(seed), nodes=12, strategies=3, edges=20, tightness=0.2
    )
    check_against_brute_force(problem, "auto")


def test_contest_example() -> None:
    """The toy of the contest's page: memory forbids the cheapest choice."""
    costs = [[15], [55, 65], [25, 45, 35], [85, 75], [95]]
    intervals = [(30, 70), (40, 70), (50, 120), (110, 140), (110, 150)]
    usages = [[10], [25, 25], [15, 20, 15], [10, 10], [15]]
    edges = [
        (0, 1, [30, 40]),
        (0, 2, [50, 10, 40]),
        (1, 3, [90, 10, 20, 80]),
        (2, 4, [60, 20, 30]),
        (3, 4, [70, 60]),
    ]
    sizes = [len(c) for c in costs]
    problem = Problem(
        tuple(np.array(c, float) for c in costs),
        tuple(Edge(i, j, np.array(c, float).reshape(sizes[i], sizes[j])) for i, j, c in edges),
        tuple(Usage(n, *intervals[n], np.array(u, float)) for n, u in enumerate(usages)),
        50.0,
    )
    outcome = solve(problem)
    # By hand: node 2 must not use 20 beside 10 + 25, so it takes strategy 2 (35 + 40 + 30).
    assert outcome.choice is not None
    assert outcome.choice.tolist() == [0, 0, 2, 1, 0]
    assert outcome.cost == 15 + 55 + 35 + 75 + 95 + 30 + 40 + 10 + 30 + 60


def test_one_expensive_entry_does_not_drown_the_rest() -> None:
    """A coefficient 16 orders above the others must not blur them."""
    rng = np.random.default_rng(5)
    costs = tuple(rng.integers(0, 50, 3).astype(float) for _ in range(8))
    edges = []
    for i in range(8):
        for j in range(i):
            cost = rng.integers(0, 30, (3, 3)).astype(float)
            cost[0, 0] = 1e17
            edges.append(Edge(i, j, cost))
    usages = tuple(Usage(n, 0, 1, rng.integers(0, 9, 3).astype(float)) for n in range(8))
    problem = Problem(costs, tuple(edges), usages, 25.0)
    check_against_brute_force(problem, "auto")


@pytest.mark.parametrize("factor", [1e-9, 1e-3, 1e6])
def test_cost_unit_does_not_matter(factor: float) -> None:
    problem = random_problem(np.random.default_rng(11), nodes=8, edges=12)
    scaled = Problem(
        tuple(c * factor for c in problem.costs),
        tuple(Edge(e.i, e.j, e.cost * factor) for e in problem.edges),
        problem.usages,
        problem.limit,
    )
    assert solve(scaled).cost == pytest.approx(solve(problem).cost * factor, rel=1e-12)


def test_same_input_and_seed_same_choice() -> None:
    problem = random_problem(np.random.default_rng(3), nodes=10, edges=16)
    first, second = solve(problem, seed=7), solve(problem, seed=7)
    assert first == second or np.array_equal(first.choice, second.choice)


def test_infeasible_limit_is_proven() -> None:
    problem = Problem((np.zeros(2),), (), (Usage(0, 0, 1, np.array([3.0, 4.0])),), 2.0)
    for backend in ("auto", "highs"):
        outcome = solve(problem, backend=backend)
        assert (outcome.status, outcome.choice) == ("infeasible", None)
        assert math.isinf(outcome.bound)


def test_an_all_forbidden_strategy_is_fine_and_an_all_forbidden_node_is_not() -> None:
    problem = Problem((np.array([np.inf, 2.0]), np.array([1.0])))
    assert solve(problem).cost == 3.0
    assert solve(Problem((np.array([np.inf, np.inf]),))).status == "infeasible"


def test_parallel_and_reversed_edges_add_up() -> None:
    a = np.array([[0.0, 5.0], [5.0, 0.0]])
    b = np.array([[9.0, 0.0], [1.0, 9.0]])
    problem = Problem((np.zeros(2), np.zeros(2)), (Edge(0, 1, a), Edge(1, 0, b), Edge(0, 0, a * 2)))
    # (0, 1): 5 + b[1, 0] = 6; (1, 0): 5 + b[0, 1] = 5; the diagonal ones cost 9.
    outcome = solve(problem)
    assert outcome.choice is not None
    assert outcome.choice.tolist() == [1, 0]
    assert outcome.cost == 5.0


def test_an_empty_problem_costs_nothing() -> None:
    outcome = solve(Problem(()))
    assert (outcome.status, outcome.cost) == ("optimal", 0.0)


def test_warm_start_is_never_lost() -> None:
    problem = random_problem(np.random.default_rng(3), nodes=10, edges=16)
    best = solve(problem)
    again = solve(problem, warm_start=best.choice, time_limit=0.0)
    assert again.cost == best.cost


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (Problem((np.zeros(2),), (Edge(0, 1, np.zeros((2, 2))),)), "no such node"),
        (Problem((np.zeros(2),) * 2, (Edge(0, 1, np.zeros((2, 3))),)), "expected shape"),
        (Problem((np.array([np.nan]),)), "costs must be"),
        (Problem((np.zeros(1),), (), (Usage(0, 0, 1, np.array([-1.0])),)), "not negative"),
        (Problem((np.zeros(1),), (), (Usage(0, 0, 1, np.zeros(2)),)), "does not match"),
    ],
)
def test_malformed_problems_are_refused(problem: Problem, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        solve(problem)


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown backend"):
        solve(Problem(()), backend="magic")


# ---- ending early --------------------------------------------------------------------------------


def hard() -> Problem:
    """A torus of 6 x 6 nodes in which the cheaper strategies need more."""
    rng = np.random.default_rng(0)
    amounts = [rng.random(4) for _ in range(36)]
    costs = tuple(1.0 - amount + 0.3 * rng.random(4) for amount in amounts)
    ends = [(6 * i + j, 6 * k + m) for i in range(6) for j in range(6)
            for k, m in ((i, (j + 1) % 6), ((i + 1) % 6, j))]  # fmt: skip
    edges = tuple(Edge(i, j, rng.random((4, 4))) for i, j in ends)
    usages = tuple(Usage(n, 0, 1, amount) for n, amount in enumerate(amounts))
    return Problem(costs, edges, usages, 14.0)


def looked(gap: float, worth: bool, hopeless: float = np.inf) -> tuple[Outcome, list[Outcome]]:
    asked: list[Outcome] = []

    def ask(outcome: Outcome) -> bool:
        asked.append(outcome)
        return worth

    look = Look(gap, ask, hopeless)
    return solve(hard(), backend="lns", work_limit=10, look=look), asked


def test_every_better_choice_is_looked_at() -> None:
    found, asked = looked(1.0, worth=True)
    costs = [o.cost for o in asked]
    assert len(costs) > 1
    assert all(later < earlier for earlier, later in pairwise(costs))
    assert found.cost == costs[-1]


def test_only_choices_near_the_bound_are_looked_at() -> None:
    _, asked = looked(0.05, worth=True)
    assert asked
    assert all(o.cost - o.bound <= 0.05 * o.cost for o in asked)


def test_a_look_ends_the_search() -> None:
    found, asked = looked(1.0, worth=False)
    assert len(asked) == 1
    assert found.cost == asked[0].cost
    assert found.status == "feasible"


def test_a_hopeless_bound_ends_the_search() -> None:
    whole, _ = looked(0.0, worth=True)
    ended, _ = looked(0.0, worth=True, hopeless=whole.bound * 0.5)
    assert whole.bound * 0.5 <= ended.bound < whole.bound
    assert ended.cost > whole.cost
