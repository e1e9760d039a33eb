"""The core of a problem: the strategies and pairs whose reduced cost is small.

Only reading reduced costs and cutting out the core belong here. If the linear relaxation has
value b and column k has reduced cost d_k, every choice that uses k costs at least b + d_k. So
the best choice of the core {k: d_k ≤ δ} is an optimum of the whole if it costs at most b + δ,
and where the core has none of such cost, b + δ is a better bound than b.
"""

from __future__ import annotations

import numpy as np

from planner.ilp.linearise import Linear
from planner.ilp.problem import Vector
from planner.ilp.work import Work

PER_NODE = 1.3
"""Strategies per node of the first core: the fractional ones and their nearest rivals."""
FIRST_SHARE = 1e-5
"""Many reduced costs are zero up to rounding; a core of those alone is useless."""
ROUNDING = 1e-9
"""Reduced costs are known to about this share of the relaxation's value."""


def first_width(linear: Linear, reduced: Vector, bound: float) -> float:
    """δ of the first core: PER_NODE · nodes strategies, or a share of what is undecided."""
    own = np.sort(reduced[: linear.binaries])
    at = min(int(PER_NODE * len(linear.nodes)), len(own) - 1)
    least = ROUNDING * abs(bound)
    width = max(float(own[at]), FIRST_SHARE * (bound - linear.offset), least)
    # Never zero: a core that is too small is followed by a multiple of its width.
    return width if width > 0 else float(min(reduced[reduced > 0], default=np.inf))


def share(linear: Linear, reduced: Vector, width: float) -> float:
    """Part of all columns that a core of this width keeps."""
    return float((reduced <= width).mean()) if len(reduced) else 1.0


def cut(work: Work, linear: Linear, reduced: Vector, width: float) -> Work:
    """A copy of `work` with the core only; its choices expand to ones of `work`.

    Raises Infeasible where a node keeps nothing.
    """
    inside = reduced <= width
    core = work.copy()
    for pair in linear.pairs:
        table = pair.index
        kept = np.zeros(table.shape, dtype=bool)
        kept[table >= 0] = inside[pair.first + table[table >= 0]]
        if kept.all():
            continue
        cost = np.where(
            kept[pair.row_class[:, None], pair.column_class], work.adj[pair.i][pair.j], np.inf
        )
        core.adj[pair.i][pair.j] = cost
        core.adj[pair.j][pair.i] = cost.T
    for n in linear.nodes:
        own = inside[linear.first[n] : linear.first[n] + linear.sizes[n]]
        if not own.all():
            core.keep(n, np.flatnonzero(own))
    return core
