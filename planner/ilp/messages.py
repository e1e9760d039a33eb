"""Sequential tree-reweighted message passing on the whole graph, vectorised by levels.

Only the relaxation without limit belongs here (prices of memory are added to node costs by the
caller). The graph is split into chains that are monotone in the node order; each sweep makes
the chains agree better and never lowers their summed minima, which is the bound (Kolmogorov,
Convergent Tree-Reweighted Message Passing, PAMI 2006). Any order will do: here many segments of
the program advance side by side, so that levels are few and large.

Nodes of one level have no edge in common, so a level is one batch of flat array operations:
cells of all matrices are stored twice, ordered for minimising over either end. Large matrices, of
which there are few, are minimised over one by one: picking what is added to each of their cells
would take longer than adding it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.ilp.levels import Cut, before, ranges
from planner.ilp.problem import Matrix, Vector
from planner.ilp.work import Work

Ints = NDArray[np.int64]

LARGE_CELLS = 4096
"""A matrix of so many cells takes longer than a call of its own."""
SEGMENT_NODES = 200
"""Nodes that follow each other in the order of the problem before another segment starts.
Shorter ones make levels larger, and news travels from segment to segment once per sweep."""


@dataclass
class Large:
    """A large matrix (other label, own label) of a batch: where its own labels are among those
    that are sent, and its message among what is written."""

    cost: Matrix
    sent: slice
    written: slice


@dataclass
class Batch:
    """One level of one direction: its nodes, their labels, the messages they send."""

    nodes: Ints
    label_at: Ints  # columns (labels) of these nodes, flat
    label_start: Ints  # where each node's labels start in `label_at`
    node_of_label: Ints  # position in `nodes` of each label
    in_message: Ints  # flat indices of messages that arrive at these nodes
    in_label: Ints  # the label (position in label_at) each belongs to
    gamma: Vector  # [labels]: share of the node's cost a chain gets
    free: Vector  # [nodes]: share of the node's minimum that no outgoing chain carries
    send_label: Ints  # per (edge, own label): position in label_at
    send_back: Ints  # per (edge, own label): flat index of the reverse message
    cells: Vector  # costs ordered by (edge, other label, own label), without large matrices
    cell_send: Ints  # per cell: which (edge, own label)
    cell_start: Ints  # where each (edge, other label) starts
    out_message: Ints  # flat index of each message entry that is written
    out_start: Ints  # where each edge's message starts in `out_message`
    out_edge: Ints  # per message entry: which edge of the batch
    large: list[Large]  # of the last edges of the batch


class Messages:
    """Messages of a graph. Label columns are as in `profile.Profile`."""

    def __init__(self, work: Work) -> None:
        self.nodes = work.nodes()
        self.sizes = np.array([work.size(n) for n in self.nodes], dtype=np.int64)
        self.first = np.concatenate([[0], np.cumsum(self.sizes)])
        self.labels = int(self.first[-1])
        self.unary = np.concatenate([np.zeros(0), *(work.costs[n] for n in self.nodes)])
        index = {n: k for k, n in enumerate(self.nodes)}
        self.rank = interleaved(len(self.nodes))
        self.edges = [
            (index[i], index[j], cost)
            for i in self.nodes for j, cost in work.adj[i].items()
            if self.rank[index[i]] < self.rank[index[j]]
        ]  # fmt: skip
        ends = np.array([(i, j) for i, j, _ in self.edges], dtype=np.int64).reshape(-1, 2)
        self.low, self.high = ends[:, 0], ends[:, 1]
        # Message e,high (at the labels of the higher end) and e,low, one after the other.
        lengths = self.sizes[ends[:, ::-1]]
        self.to_high, self.to_low = before(lengths.ravel()).reshape(-1, 2).T
        self.message = np.zeros(int(lengths.sum()))
        self.forward = self._batches(up=True)
        self.backward = self._batches(up=False)

    def levels(self, *, up: bool) -> Ints:
        """Of every node the length of the longest monotone path that leads to it."""
        level = [0] * len(self.nodes)
        source, target = (self.low, self.high) if up else (self.high, self.low)
        rank = self.rank[source]
        for e in np.argsort(rank if up else -rank, kind="stable").tolist():
            level[target[e]] = max(level[target[e]], level[source[e]] + 1)
        return np.array(level, dtype=np.int64)

    def _batches(self, *, up: bool) -> list[Batch]:
        """Everything flat, in the order of the levels; then cut."""
        level = self.levels(up=up)
        count = int(level.max(initial=-1)) + 1
        nodes = np.argsort(level, kind="stable")
        sizes, at_level = self.sizes[nodes], level[nodes]
        rank, start = np.empty_like(nodes), np.empty_like(nodes)
        rank[nodes] = np.arange(len(nodes))
        start[nodes] = before(sizes, at_level)
        ahead, behind = (np.bincount(end, minlength=len(nodes)) for end in (self.low, self.high))
        chains = np.maximum(np.maximum(ahead, behind), 1)[nodes]
        outgoing = (ahead if up else behind)[nodes]

        end = np.concatenate([self.high, self.low])  # of messages that arrive
        arriving = np.argsort(rank[end], kind="stable")
        end, message = end[arriving], np.concatenate([self.to_high, self.to_low])[arriving]

        own, other, out, back = self.low, self.high, self.to_high, self.to_low
        if not up:
            own, other, out, back = other, own, back, out
        large = self.sizes[own] * self.sizes[other] >= LARGE_CELLS
        sent = np.lexsort((rank[own], large, level[own]))
        own, other, out, back, large = own[sent], other[sent], out[sent], back[sent], large[sent]
        size, width, by = self.sizes[own], self.sizes[other], level[own]
        at_send, at_entry = before(size, by), before(width, by)
        costs = [self.edges[e][2].T if up else self.edges[e][2] for e in sent.tolist()]
        few = ~large
        cells = [np.zeros(0), *(costs[e].ravel() for e in np.flatnonzero(few).tolist())]
        row, of_row = np.repeat(size[few], width[few]), np.repeat(by[few], width[few])
        alone: list[list[Large]] = [[] for _ in range(count)]
        for e in np.flatnonzero(large).tolist():
            alone[by[e]].append(
                Large(
                    np.ascontiguousarray(costs[e]),
                    slice(at_send[e], at_send[e] + size[e]),
                    slice(at_entry[e], at_entry[e] + width[e]),
                )
            )

        one = np.ones_like(nodes)
        per_node, per_label = Cut(at_level, one, count), Cut(at_level, sizes, count)
        per_arrival = Cut(level[end], self.sizes[end], count)
        per_edge, per_send = Cut(by, np.ones_like(by), count), Cut(by, size, count)
        per_cell, per_row = Cut(by, few * size * width, count), Cut(by, few * width, count)
        per_entry = Cut(by, width, count)
        columns = (
            per_node(nodes), per_label(ranges(self.first[nodes], sizes)), per_node(start[nodes]),
            per_label(np.repeat(before(one, at_level), sizes)),
            per_arrival(ranges(message, self.sizes[end])),
            per_arrival(ranges(start[end], self.sizes[end])),
            per_label(np.repeat(1.0 / chains, sizes)), per_node(1.0 - outgoing / chains),
            per_send(ranges(start[own], size)), per_send(ranges(back, size)),
            per_cell(np.concatenate(cells)),
            per_cell(ranges(np.repeat(at_send[few], width[few]), row)),
            per_row(before(row, of_row)), per_entry(ranges(out, width)),
            per_edge(at_entry), per_entry(np.repeat(before(np.ones_like(by), by), width)), alone,
        )  # fmt: skip
        return [Batch(*parts) for parts in zip(*columns, strict=True)] if count else []

    def belief(self, batch: Batch, cost: Vector) -> Vector:
        """Own cost plus all incoming messages, over the labels of the batch."""
        incoming = np.bincount(
            batch.in_label, weights=self.message[batch.in_message], minlength=len(batch.label_at)
        )
        belief: Vector = cost[batch.label_at] + incoming
        return belief

    def sweep(self, cost: Vector, *, up: bool) -> float:
        """One pass over all nodes; `cost` [labels] are node costs. Returns the bound."""
        bound = 0.0
        for batch in self.forward if up else self.backward:
            belief = self.belief(batch, cost)
            least = np.minimum.reduceat(belief, batch.label_start)
            bound += float(batch.free @ least) + self.send(batch, belief)
        return bound

    def send(self, batch: Batch, belief: Vector) -> float:
        """Messages of a level to the nodes after it; returns the minima taken out of them."""
        if len(batch.out_message) == 0:
            return 0.0
        give = (belief * batch.gamma)[batch.send_label] - self.message[batch.send_back]
        values = np.empty(len(batch.out_message))
        if len(batch.cell_start):
            values[: len(batch.cell_start)] = np.minimum.reduceat(
                batch.cells + give[batch.cell_send], batch.cell_start
            )
        for m in batch.large:
            values[m.written] = (m.cost + give[m.sent]).min(axis=1)
        floor = np.minimum.reduceat(values, batch.out_start)
        self.message[batch.out_message] = values - floor[batch.out_edge]
        return float(floor.sum())


def interleaved(count: int) -> Ints:
    """The place of every node in the order: the first node of every segment, then the second."""
    segments = max(1, count // SEGMENT_NODES)
    length = -(-count // segments)
    segment, step = np.divmod(np.arange(count), max(1, length))
    rank: Ints = step * segments + segment
    return rank
