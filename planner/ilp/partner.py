"""A second process that improves the same problem beside the first, and a board between them.

Only forking, showing each other choices and ending the second process belong here. It is a copy
of the first at the moment of the fork. Each side shows its best choice in memory both can read
and merges what the other shows; a choice read while it is being written is a mixture of two,
which merging copes with, so nobody ever waits. Only searches with a time limit have a partner:
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

Ints = NDArray[np.int64]
PATIENCE_S = 1.0
"""How long an ended search waits for its partner to notice before ending it."""


class Partner:
    """One side of the board: a count of the choices shown, and the last of them."""

    def __init__(self, board: Ints, side: int, parent: int | None = None) -> None:
        self.mine, self.other = board[side], board[1 - side]
        self.seen = 0
        self.parent = parent

    def show(self, choice: Ints) -> None:
        self.mine[1:] = choice
        self.mine[0] += 1

    def news(self) -> Ints | None:
        """What the other side has shown since the last look, if anything."""
        count = int(self.other[0])
        if count == self.seen:
            return None
        self.seen = count
        return self.other[1:].copy()

    def orphaned(self) -> bool:
        """For the second process: whether the first has gone."""
        return self.parent is not None and os.getppid() != self.parent


def possible() -> bool:
    """Whether there is a second processor, and forking is safe."""
    return sys.platform == "linux" and len(os.sched_getaffinity(0)) > 1


@contextlib.contextmanager
def beside(nodes: int, work: Callable[[Partner], None]) -> Iterator[Partner]:
    """Runs `work` in a fork of this process until the block is left."""
    context = multiprocessing.get_context("fork")
    memory = mmap.mmap(-1, 2 * 8 * (nodes + 1))
    board = np.frombuffer(memory, dtype=np.int64).reshape(2, nodes + 1)
    first = os.getpid()
    process = context.Process(target=lambda: work(Partner(board, 1, first)), daemon=True)
    process.start()
    try:
        yield Partner(board, 0)
    finally:
        process.terminate()
        process.join(PATIENCE_S)
        if process.is_alive():
            process.kill()
            process.join()
