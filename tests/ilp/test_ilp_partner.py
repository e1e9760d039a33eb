"""Two processes on one problem: what one shows the other sees, and none stays behind."""

from __future__ import annotations

import multiprocessing
import os
import time

import numpy as np
import pytest
from ilp_support import from_seed

from planner.ilp import Edge, Problem, Usage, evaluate, solve
from planner.ilp.clock import Clock
from planner.ilp.partner import Partner, beside, possible
from planner.ilp.solver import search

pytestmark = pytest.mark.skipif(not possible(), reason="needs Linux and two processors")
LONG_S = 60.0
"""How long a busy machine may need for what takes milliseconds."""


def seen(other: Partner, value: int) -> bool:
    """Whether the other side shows `value` before long."""
    until = time.monotonic() + LONG_S
    while time.monotonic() < until:
        news = other.new_choice()
        if news is not None and news[0] == value:
            return True
        time.sleep(0.01)
    return False


def add_one(other: Partner) -> None:
    """Answers 7 with 8 and stays until it is ended."""
    if seen(other, 7):
        other.show_prices(np.array([0.5, 1.5]))
        other.show_choice(np.array([8, 8, 8]))
    time.sleep(LONG_S)


def test_each_side_sees_what_the_other_shows() -> None:
    with beside(3, 2, add_one) as other:
        assert other.new_choice() is None
        other.show_choice(np.array([7, 7, 7]))
        assert seen(other, 8)
        prices = other.new_prices()
        assert prices is not None
        assert prices.tolist() == [0.5, 1.5]
        assert other.new_prices() is None
        assert other.new_choice() is None
    assert not multiprocessing.active_children()


def test_the_partner_ends_with_an_error_in_the_block() -> None:
    with pytest.raises(KeyError), beside(3, 2, add_one):
        raise KeyError("stop")
    assert not multiprocessing.active_children()


def test_a_partner_that_fails_does_not_harm() -> None:
    with beside(3, 2, lambda other: os._exit(1)) as other:
        other.show_choice(np.array([7, 7, 7]))
        assert other.new_choice() is None


def grid(side: int) -> Problem:
    """Neighbours on a grid at random costs, with memory for about half of what is wanted."""
    rng = np.random.default_rng(0)
    at = np.arange(side * side).reshape(side, side)
    pairs = [*zip(at[:, :-1].flat, at[:, 1:].flat, strict=True)]
    pairs += [*zip(at[:-1].flat, at[1:].flat, strict=True)]
    costs = tuple(rng.integers(0, 99, 4).astype(float) for _ in at.flat)
    edges = tuple(Edge(int(i), int(j), rng.integers(0, 99, (4, 4)).astype(float)) for i, j in pairs)
    usages = tuple(Usage(int(n), 0, 1, rng.integers(0, 9, 4).astype(float)) for n in at.flat)
    return Problem(costs, edges, usages, 2.0 * side * side)


def test_a_search_with_a_partner_is_honest() -> None:
    problem = grid(7)
    best = solve(problem)
    assert best.status == "optimal"
    costs: list[float] = []
    clock = Clock.of(5.0)
    found = search(
        problem, "lns", clock, None, 0, None, 0.0, lambda cost, bound: costs.append(cost), pair=True
    )
    assert found.choice is not None
    priced = evaluate(problem, found.choice)
    assert priced.fits
    assert priced.cost == costs[-1] >= best.cost
    assert found.bound <= best.cost * (1 + 1e-9)
    assert not multiprocessing.active_children()


def test_without_a_time_limit_there_is_no_partner(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("forked")

    monkeypatch.setattr("planner.ilp.partner.beside", refuse)
    search(from_seed(7), "lns", Clock.of(None), 10, 0, None, 0.0, None, pair=True)


def test_a_worker_that_may_have_no_children_works_alone() -> None:
    """`multiprocessing.Pool` runs workers that must not fork."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(possible) is False
