"""Every rule of presolve, applied alone, keeps the optimum: against brute force.

Up to 12 nodes with binding memory and forbidden pairs. Each rule must also be seen at work, so
that none passes by never doing anything.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ilp_support import brute_force, random_problem

from planner.ilp import Problem, evaluate
from planner.ilp.presolve_dominance import drop_dominated, forbid_pairs
from planner.ilp.presolve_edges import (
    contract_determined,
    drop_infinite,
    drop_unsupported,
    fold_separable,
)
from planner.ilp.presolve_elimination import eliminate
from planner.ilp.work import Infeasible, Work

Rule = Callable[[Work], bool]
EXAMPLES = 60


def from_seed(seed: int) -> Problem:
    """2 to 12 nodes of up to 3 strategies, some of them forbidden, and tight memory."""
    rng = np.random.default_rng(seed)
    nodes = int(rng.integers(2, 13))
    problem = random_problem(
        rng, nodes=nodes, strategies=3, edges=int(rng.integers(1, 2 * nodes)),
        tightness=float(rng.uniform(0.0, 0.3)),
    )  # fmt: skip
    costs = [np.where(rng.random(len(c)) < 0.1, np.inf, c) for c in problem.costs]
    return Problem(tuple(costs), problem.edges, problem.usages, problem.limit)


def on_edges(rule: Callable[[Work, int, int], bool]) -> Rule:
    def apply(work: Work) -> bool:
        done = False
        for i in work.nodes():
            for j in list(work.adj[i]):
                if work.present[i] and j in work.adj[i]:
                    done |= rule(work, i, j)
        return done

    return apply


def on_nodes(rule: Callable[[Work, int], bool]) -> Rule:
    def apply(work: Work) -> bool:
        done = False
        for n in work.nodes():
            if work.present[n]:
                done |= rule(work, n)
        return done

    return apply


def finite(work: Work, i: int, j: int) -> np.ndarray:
    return np.isfinite(work.adj[i][j])


def contract(work: Work, i: int, j: int) -> bool:
    """The rule asks for strategies that all have support."""
    pairs = finite(work, i, j)
    supported = pairs.any(axis=0).all() and pairs.any(axis=1).all()
    return bool(supported) and contract_determined(work, i, j, pairs)


def of_degree(degree: int) -> Callable[[Work, int], bool]:
    def rule(work: Work, n: int) -> bool:
        return len(work.adj[n]) == degree and eliminate(work, n)

    return rule


def settle(work: Work, n: int) -> bool:
    if work.size(n) > 1 or not np.isfinite(work.costs[n][0]):
        return False
    work.settle(n, 0)
    return True


def trim(work: Work) -> bool:
    before = len(work.base)
    work.trim_time()
    return len(work.base) < before


def crowded(work: Work) -> bool:
    before = [work.size(n) for n in work.nodes()]
    work.drop_crowded()
    return before != [work.size(n) for n in work.nodes()]


RULES: dict[str, Rule] = {
    "infinite strategy": on_nodes(drop_infinite),
    "single strategy": on_nodes(settle),
    "arc consistency": on_edges(lambda w, i, j: drop_unsupported(w, i, j, finite(w, i, j))),
    "contraction": on_edges(contract),
    "separable edge": on_edges(
        lambda w, i, j: bool(finite(w, i, j).all()) and fold_separable(w, i, j)
    ),
    "dominated strategy": on_nodes(drop_dominated),
    "dominated pair": on_nodes(forbid_pairs),
    "degree 0": on_nodes(of_degree(0)),
    "degree 1": on_nodes(of_degree(1)),
    "degree 2": on_nodes(of_degree(2)),
    "time points": trim,
    "crowded strategy": crowded,
}


def best_of_rest(problem: Problem, work: Work) -> float:
    """The least cost over every choice left, each priced by the referee; inf if none fits."""
    nodes = work.nodes()
    sizes = [work.size(n) for n in nodes]
    choices = np.zeros((int(np.prod(sizes)), problem.size), dtype=np.int64)
    if nodes:
        choices[:, nodes] = np.transpose(np.unravel_index(np.arange(len(choices)), sizes))
    cost = np.full(len(choices), work.offset)
    for n in nodes:
        cost += work.costs[n][choices[:, n]]
        for m, edge in work.adj[n].items():
            if n < m:
                cost += edge[choices[:, n], choices[:, m]]
    for k in np.argsort(cost, kind="stable"):
        if cost[k] == np.inf:
            return np.inf
        if work.load(choices[k]).max(initial=0.0) <= work.limit:
            priced = evaluate(problem, work.expand(choices[k]))
            assert priced.fits
            assert priced.cost == pytest.approx(cost[k], rel=1e-12)
            return priced.cost
    return np.inf


def keeps_the_optimum(rule: Rule, problem: Problem) -> bool:
    """Checks one example; True if the rule did anything."""
    best = brute_force(problem)
    try:
        work = Work(problem)
        worked = rule(work)
        cost = best_of_rest(problem, work)
    except Infeasible:
        worked, cost = True, np.inf
    assert cost == pytest.approx(np.inf if best is None else best.cost, rel=1e-12)
    return worked


@pytest.mark.parametrize("name", RULES)
def test_the_rule_alone_keeps_the_optimum(name: str) -> None:
    worked = 0

    @settings(max_examples=EXAMPLES, deadline=None)
    @given(st.integers(0, 2**32 - 1))
    def check(seed: int) -> None:
        nonlocal worked
        worked += keeps_the_optimum(RULES[name], from_seed(seed))

    check()
    assert worked > 0, "the rule never found anything to do"
