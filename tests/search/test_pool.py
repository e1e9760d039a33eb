"""Calls spread over processes that may die: results in order, none lost but the one that kills."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence

import pytest

from planner.search import pool
from planner.search.pool import Lost, Processes, processes

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


class Rolled:
    """Calls whose items are taken one after the other, with what was done by then."""

    def __init__(self, spread: Processes, numbers: Sequence[int], ahead: int) -> None:
        self.numbers = numbers
        self.found: dict[int, int] = {}
        self.known: list[list[int]] = []
        spread.rolling(squared, self.items(), self.found.__setitem__, lambda n: -n, ahead)

    def items(self) -> Iterator[int]:
        for number in self.numbers:
            self.known.append(list(self.found))
            yield number


@pytest.mark.parametrize("cores", [1, 2])
def test_rolling_calls_know_of_all_but_the_few_before_them(
    cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "_cores", lambda: cores)
    numbers = list(range(10, 18))
    with processes(8) as spread:
        rolled = Rolled(spread, numbers, 3)
    assert rolled.known == [numbers[: max(0, k - 2)] for k in range(8)]
    assert rolled.found == {n: n**2 for n in numbers}


def test_rolling_calls_survive_the_one_that_is_lost() -> None:
    with processes(8) as spread:
        rolled = Rolled(spread, range(8), 3)
        assert spread(squared, [6, 7]) == [36, 49]
    assert list(rolled.found.items()) == [(n, -n if n == FATAL else n**2) for n in range(8)]
