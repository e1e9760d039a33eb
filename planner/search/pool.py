"""Calls of one function spread over processes; results come in the order of the calls.

Only the spreading belongs here. What is called must be a module's function, and arguments and
results must pickle. Processes are started afresh: a fork of a program with threads may hang.
A process that dies (out of memory, as a rule) takes the others with it; what they had not done is
then called again one after the other, and the call of which its process dies alone is *lost*.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from typing import NoReturn, Protocol, TypeVar

Given = TypeVar("Given")
Made = TypeVar("Made")


class Lost(Exception):
    """The process that ran a call died."""


class Spread(Protocol):
    """`spread(function, items, done, lost)`: results in order; `done` is told of each as it ends.
    `lost` gives the result of a call whose process died; without it that raises Lost."""

    def __call__(
        self, function: Callable[[Given], Made], items: Sequence[Given],
        done: Callable[[int, Made], None] = ..., lost: Callable[[Given], Made] = ...,
    ) -> list[Made]: ...  # fmt: skip


def _nobody(index: int, made: object) -> None:
    """What `done` does where nobody listens."""


def _raise(item: object) -> NoReturn:
    raise Lost("a process died, probably for want of memory")


@contextmanager
def processes(calls: int) -> Iterator[Spread]:
    """For about `calls` calls at a time: on as many processes as there are cores for them. What
    runs in such a process itself gets no more."""
    workers = 1 if parent_process() is not None else min(_cores(), calls)
    if workers <= 1:
        yield in_turn
        return
    pool = _Pool(workers)
    try:
        yield pool
    finally:
        pool.stop()


@dataclass
class _Pool:
    workers: int
    executor: ProcessPoolExecutor | None = None

    def __call__(
        self, function: Callable[[Given], Made], items: Sequence[Given],
        done: Callable[[int, Made], None] = _nobody, lost: Callable[[Given], Made] = _raise,
    ) -> list[Made]:  # fmt: skip
        found: dict[int, Made] = {}

        def tell(index: int, made: Made) -> None:
            found[index] = made
            done(index, made)

        try:
            return over(self._started(self.workers))(function, items, tell)
        except BrokenProcessPool:
            self.stop()
        for index in [i for i in range(len(items)) if i not in found]:
            try:
                (made,) = over(self._started(1))(function, [items[index]])
            except BrokenProcessPool:
                made = lost(items[index])
                self.stop()
            tell(index, made)
        self.stop()  # the next calls get all workers again
        return [found[i] for i in range(len(items))]

    def _started(self, workers: int) -> ProcessPoolExecutor:
        if self.executor is None:
            self.executor = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
        return self.executor

    def stop(self) -> None:
        if self.executor is not None:
            self.executor.shutdown(wait=False, cancel_futures=True)
            self.executor = None


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def in_turn(
    function: Callable[[Given], Made], items: Sequence[Given],
    done: Callable[[int, Made], None] = _nobody, lost: Callable[[Given], Made] = _raise,
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
        done: Callable[[int, Made], None] = _nobody, lost: Callable[[Given], Made] = _raise,
    ) -> list[Made]:  # fmt: skip
        futures = {executor.submit(function, item): i for i, item in enumerate(items)}
        found: dict[int, Made] = {}
        for future in as_completed(futures):
            index = futures[future]
            found[index] = future.result()
            done(index, found[index])
        return [found[i] for i in range(len(items))]

    return spread
