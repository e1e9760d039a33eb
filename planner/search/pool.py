"""Calls of one function spread over processes; results come in the order of the calls.

Only the spreading belongs here. What is called must be a module's function, and arguments and
results must pickle. Processes are started afresh: a fork of a program with threads may hang.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Protocol, TypeVar

Given = TypeVar("Given")
Made = TypeVar("Made")


class Spread(Protocol):
    """`spread(function, items, done)`: results in order; `done` is told of each as it ends."""

    def __call__(
        self, function: Callable[[Given], Made], items: Sequence[Given],
        done: Callable[[int, Made], None] = ...,
    ) -> list[Made]: ...  # fmt: skip


def _nobody(index: int, made: object) -> None:
    """What `done` does where nobody listens."""


@contextmanager
def processes(calls: int) -> Iterator[Spread]:
    """For about `calls` calls at a time: on as many processes as there are cores for them."""
    workers = min(_cores(), calls)
    if workers <= 1:
        yield in_turn
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as executor:
        try:
            yield over(executor)
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            raise


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def in_turn(
    function: Callable[[Given], Made], items: Sequence[Given],
    done: Callable[[int, Made], None] = _nobody,
) -> list[Made]:  # fmt: skip
    """One call after the other, in this process."""
    found = []
    for index, item in enumerate(items):
        found.append(function(item))
        done(index, found[-1])
    return found


def over(executor: Executor) -> Spread:
    """Calls by an executor of `concurrent.futures`, or what behaves like one."""

    def spread(
        function: Callable[[Given], Made], items: Sequence[Given],
        done: Callable[[int, Made], None] = _nobody,
    ) -> list[Made]:  # fmt: skip
        futures = {executor.submit(function, item): i for i, item in enumerate(items)}
        found: dict[int, Made] = {}
        for future in as_completed(futures):
            index = futures[future]
            found[index] = future.result()
            done(index, found[index])
        return [found[i] for i in range(len(items))]

    return spread
