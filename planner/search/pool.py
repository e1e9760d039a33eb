"""Calls of one function spread over processes; results come in the order of the calls.

Only the spreading belongs here. What is called must be a module's function, and arguments and
results must pickle. Processes are started afresh: a fork of a program with threads may hang.
A process that dies (out of memory, as a rule) takes the others with it; what they had not done is
then called again one after the other, and the call of which its process dies alone is *lost*.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
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


class Processes(Spread, Protocol):
    """Calls may also depend on what others have brought."""

    def rolling(
        self, function: Callable[[Given], Made], items: Iterable[Given],
        done: Callable[[Given, Made], None], lost: Callable[[Given], Made], ahead: int,
    ) -> None:  # fmt: skip
        """`done` is told of the calls in their order. An item is taken when fewer than `ahead`
        wait to be done, so which others it can know of does not depend on their speed."""


def _nobody(index: int, made: object) -> None:
    """What `done` does where nobody listens."""


def _raise(item: object) -> NoReturn:
    raise Lost("a process died, probably for want of memory")


@contextmanager
def processes(calls: int) -> Iterator[Processes]:
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
            tell(index, self._alone(function, items[index], lost))
        self.stop()  # the next calls get all workers again
        return [found[i] for i in range(len(items))]

    def rolling(
        self, function: Callable[[Given], Made], items: Iterable[Given],
        done: Callable[[Given, Made], None], lost: Callable[[Given], Made], ahead: int,
    ) -> None:  # fmt: skip
        coming = iter(items)
        waiting: deque[tuple[Given, Future[Made]]] = deque()
        while True:
            for item in islice(coming, ahead - len(waiting)):
                waiting.append((item, self._submitted(function, item)))
            if not waiting:
                return
            if not _died(waiting[0][1]):
                item, future = waiting.popleft()
                done(item, future.result())
                continue
            self.stop()
            for item, future in waiting:
                died = _died(future)
                done(item, self._alone(function, item, lost) if died else future.result())
            waiting.clear()
            self.stop()

    def _submitted(self, function: Callable[[Given], Made], item: Given) -> Future[Made]:
        try:
            return self._started(self.workers).submit(function, item)
        except BrokenProcessPool as error:  # a process has died meanwhile
            refused: Future[Made] = Future()
            refused.set_exception(error)
            return refused

    def _alone(
        self, function: Callable[[Given], Made], item: Given, lost: Callable[[Given], Made]
    ) -> Made:  # fmt: skip
        try:
            return self._started(1).submit(function, item).result()
        except BrokenProcessPool:
            self.stop()
            return lost(item)

    def _started(self, workers: int) -> ProcessPoolExecutor:
        if self.executor is None:
            self.executor = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
        return self.executor

    def stop(self) -> None:
        if self.executor is not None:
            self.executor.shutdown(wait=False, cancel_futures=True)
            self.executor = None


def _died(future: Future[Made]) -> bool:
    """Whether a call's process has died, or another before the call began."""
    return isinstance(future.exception(), BrokenProcessPool)


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _InTurn:
    """One call after the other, in this process."""

    def __call__(
        self, function: Callable[[Given], Made], items: Sequence[Given],
        done: Callable[[int, Made], None] = _nobody, lost: Callable[[Given], Made] = _raise,
    ) -> list[Made]:  # fmt: skip
        found = []
        for index, item in enumerate(items):
            found.append(function(item))
            done(index, found[-1])
        return found

    def rolling(
        self, function: Callable[[Given], Made], items: Iterable[Given],
        done: Callable[[Given, Made], None], lost: Callable[[Given], Made], ahead: int,
    ) -> None:  # fmt: skip
        coming = iter(items)
        waiting = deque(islice(coming, ahead))
        while waiting:
            item = waiting.popleft()
            done(item, function(item))
            waiting.extend(islice(coming, 1))


in_turn = _InTurn()


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
