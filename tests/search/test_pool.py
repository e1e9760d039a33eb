"""Calls spread over processes that may die: results in order, none lost but the one that kills."""

from __future__ import annotations

import os
import signal

import pytest

from planner.search import pool
from planner.search.pool import Lost, processes

FATAL = 3


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_cores", lambda: 2)


def squared(number: int) -> int:
    if number == FATAL:
        os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does for want of memory
    return number**2


def test_results_in_order_with_the_lost_one_told() -> None:
    done: dict[int, int] = {}
    with processes(6) as spread:
        found = spread(squared, [0, 1, 2, FATAL, 4, 5], done.__setitem__, lambda n: -n)
        assert found == [0, 1, 4, -FATAL, 16, 25]
        assert done == dict(enumerate(found))
        assert spread(squared, [6, 7]) == [36, 49]  # and goes on


def test_without_a_result_for_it_that_is_an_error() -> None:
    with processes(2) as spread, pytest.raises(Lost, match="memory"):
        spread(squared, [1, FATAL])


def failing(number: int) -> int:
    raise ValueError(number)


def test_a_call_s_own_error_is_the_caller_s() -> None:
    with processes(2) as spread, pytest.raises(ValueError, match="7"):
        spread(failing, [7, 7])
