"""A second process that works on the same problem beside the first, and a board between them.

Only forking, showing each other what was found and ending the second process belong here. It is
a copy of the first at the moment of the fork. Each side shows its best choice and its prices in
memory that both can read. What is read while it is being written is a mixture of two, which must
not matter to the reader, so nobody ever waits. Only searches with a time limit have a partner:
what they find depends on the clock anyway.
"""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from planner.ilp.problem import Vector

Ints = NDArray[np.int64]
PATIENCE_S = 1.0
"""How long an ended search waits for its partner to notice before ending it."""


class Side:
    """What one process shows, and how often it has shown something."""

    def __init__(self, memory: Vector, nodes: int) -> None:
        self.counts, self.choice, self.prices = np.split(memory, [2, 2 + nodes])


class Partner:
    """The other process, as one of the two sees it."""

    def __init__(self, mine: Side, other: Side, parent: int | None = None) -> None:
        self.mine, self.other, self.parent = mine, other, parent
        self.seen = np.zeros(2)

    def show_choice(self, choice: Ints) -> None:
        self._show(0, self.mine.choice, choice)

    def show_prices(self, prices: Vector) -> None:
        self._show(1, self.mine.prices, prices)

    def _show(self, kind: int, shown: Vector, values: Ints | Vector) -> None:
        """Counts as news only if it differs from what is shown already."""
        if not self.mine.counts[kind] or not np.array_equal(shown, values):
            shown[:] = values
            self.mine.counts[kind] += 1

    def new_choice(self) -> Ints | None:
        """What the other has shown since the last look, if anything."""
        return self.other.choice.astype(np.int64) if self._news(0) else None

    def new_prices(self) -> Vector | None:
        return self.other.prices.copy() if self._news(1) else None

    def _news(self, kind: int) -> bool:
        count = self.other.counts[kind]
        new = bool(count > self.seen[kind])
        self.seen[kind] = count
        return new

    def orphaned(self) -> bool:
        """For the second process: whether the first has gone."""
        return self.parent is not None and os.getppid() != self.parent


def possible() -> bool:
    """Whether there is a second processor, forking is safe, and this process may have children
    (the workers of a `multiprocessing.Pool` may not)."""
    if sys.platform != "linux" or multiprocessing.current_process().daemon:
        return False
    return len(os.sched_getaffinity(0)) > 1


@contextlib.contextmanager
def beside(nodes: int, points: int, work: Callable[[Partner], None]) -> Iterator[Partner]:
    """Runs `work` in a fork of this process until the block is left."""
    context = multiprocessing.get_context("fork")
    size = 2 + nodes + points
    memory = np.frombuffer(mmap.mmap(-1, 2 * 8 * size), dtype=np.float64)
    first, second = Side(memory[:size], nodes), Side(memory[size:], nodes)
    parent = os.getpid()
    process = context.Process(target=lambda: work(Partner(second, first, parent)), daemon=True)
    process.start()
    try:
        yield Partner(first, second)
    finally:
        process.terminate()
        process.join(PATIENCE_S)
        if process.is_alive():
            process.kill()
            process.join()
