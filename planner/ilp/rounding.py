"""From messages to choices: nodes are fixed one level after the other.

Only turning the relaxation's messages into one choice, and pricing such choices fast, belongs
here. A node takes the strategy that is best given the neighbours already fixed and what the
messages say about the others; forbidden pairs cost `HARD` so that a choice always exists.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.ilp.levels import Cut, ranges
from planner.ilp.messages import Batch, Messages
from planner.ilp.problem import Vector

Ints = NDArray[np.int64]

HARD_FACTOR = 2.0**20
"""A forbidden pair costs this many times the summed magnitudes that usually occur: large enough
to be avoided, small enough that float64 still sees 10^-9 of the rest."""


@dataclass
class Plan:
    """The matrix rows that one level collects from below; messages from above: see `Batch`."""

    row_label: Ints
    owner: Ints
    base: Ints
    width: Ints


class Rounding:
    """Choices are positions [messages.nodes]; `hard` is the price of a forbidden pair."""

    def __init__(self, messages: Messages) -> None:
        self.messages = messages
        edges = messages.edges
        self.start = np.concatenate([[0], np.cumsum([e[2].size for e in edges])]).astype(np.int64)
        self.cells = np.concatenate([np.zeros(0), *(e[2].ravel() for e in edges)])
        finite = self.cells[np.isfinite(self.cells)]
        usual = float(np.median(finite[finite > 0])) if (finite > 0).any() else 1.0
        self.hard = HARD_FACTOR * usual * max(1, len(messages.nodes))
        self.forbidden = np.isinf(self.cells)
        self.soft = np.where(self.forbidden, self.hard, self.cells)
        self.plans = self._plans()

    def _plans(self) -> list[Plan]:
        """Of every level of the forward pass."""
        m = self.messages
        level = m.levels(up=True)
        rows = np.lexsort((m.high, level[m.high]))  # edges by the end that is fixed later
        node = m.high[rows]
        start = np.empty_like(m.sizes)
        for batch in m.forward:
            start[batch.nodes] = batch.label_start
        size = m.sizes[node]
        per_row = Cut(level[node], size, len(m.forward))
        columns = (
            per_row(ranges(start[node], size)), per_row(np.repeat(m.low[rows], size)),
            per_row(ranges(self.start[:-1][rows], size)), per_row(np.repeat(size, size)),
        )  # fmt: skip
        return [Plan(*parts) for parts in zip(*columns, strict=True)]

    def round(self, cost: Vector) -> Ints:
        """One choice by a pass over the levels; `cost` [labels] are node costs."""
        m = self.messages
        choice = np.zeros(len(m.nodes), dtype=np.int64)
        for batch, plan in zip(m.forward, self.plans, strict=True):
            count = len(batch.label_at)
            score = cost[batch.label_at]
            if len(batch.send_label):
                score = score + np.bincount(
                    batch.send_label, weights=m.message[batch.send_back], minlength=count
                )
            if len(plan.row_label):
                cells = self.soft[plan.base + choice[plan.owner] * plan.width]
                score = score + np.bincount(plan.row_label, weights=cells, minlength=count)
            choice[batch.nodes] = first_least(score, batch)
        return choice

    def cost(self, choice: Ints) -> float:
        """True cost (without the work's offset); inf if a forbidden pair is chosen."""
        m = self.messages
        at = self.start[:-1] + choice[m.low] * m.sizes[m.high] + choice[m.high]
        own = m.unary[m.first[:-1] + choice]
        return float(own.sum() + self.cells[at].sum())


def first_least(score: Vector, batch: Batch) -> Ints:
    """The first label of least score of every node of the batch."""
    least = np.minimum.reduceat(score, batch.label_start)
    hits = np.flatnonzero(score <= least[batch.node_of_label])
    owners = batch.node_of_label[hits]
    new = np.concatenate([[True], owners[1:] != owners[:-1]])
    at: Ints = hits[new] - batch.label_start
    return at
