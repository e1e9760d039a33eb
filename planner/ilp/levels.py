"""Flat arrays that belong to owners (nodes, edges) grouped by level.

Only index arithmetic belongs here: what depends on graphs or costs does not.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Entry = TypeVar("Entry", np.int64, np.float64)


def before(count: Ints, level: Ints | None = None) -> Ints:
    """How many entries the owners in front have together; with `level` (ascending), only those
    of the same level."""
    total: Ints = np.concatenate([[0], np.cumsum(count)])[:-1].astype(np.int64)
    if level is None or not len(level):
        return total
    new = np.concatenate([[True], level[1:] != level[:-1]])
    return total - total[new][np.cumsum(new) - 1]


def ranges(start: Ints, count: Ints) -> Ints:
    """start[k], start[k] + 1, ... (count[k] of them) for one k after the other."""
    flat: Ints = np.repeat(start - before(count), count) + np.arange(int(count.sum()))
    return flat


class Cut:
    """Cuts what `owners` of ascending `level` have, `count` entries each, into levels."""

    def __init__(self, level: Ints, count: Ints, levels: int) -> None:
        held = np.zeros(levels, dtype=np.int64)
        np.add.at(held, level, count)
        self.ends = np.cumsum(held)[:-1]

    def __call__(self, entries: NDArray[Entry]) -> list[NDArray[Entry]]:
        return np.split(entries, self.ends)
