"""Time, reduced to the points that matter: one per maximal set of simultaneously live usages.

Only interval arithmetic belongs here. If everything live at t is also live at u, a limit that
holds at u holds at t (usages are never negative), so t needs no row.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def compress(starts: Ints, stops: Ints) -> tuple[Ints, Ints, int]:
    """Half-open intervals [starts, stops) as spans [lo, hi) of dense time points.

    A point is kept where some interval starts and the next event is a stop: exactly the
    maximal live sets. Returns lo, hi (an empty span where an interval meets no kept point,
    which cannot happen for a non-empty interval) and the number of points.
    """
    if len(starts) == 0:
        return starts, stops, 0
    events = np.unique(np.concatenate([starts, stops]))
    begins = np.zeros(len(events), dtype=bool)
    begins[np.searchsorted(events, starts)] = True
    ends = np.zeros(len(events), dtype=bool)
    ends[np.searchsorted(events, stops)] = True
    # Between two stops, only the last start before the second one is maximal.
    group = np.cumsum(ends)
    last = np.zeros(len(events), dtype=bool)
    where = np.flatnonzero(begins)
    newest = np.append(group[where[1:]] != group[where[:-1]], True)
    last[where[newest]] = True
    points = events[last]
    lo = np.searchsorted(points, starts, side="left")
    hi = np.searchsorted(points, stops, side="left")
    return lo.astype(np.int64), hi.astype(np.int64), len(points)
