"""Sequential tree-reweighted message passing on the whole graph, vectorised by levels.

Only the relaxation without limit belongs here (prices of memory are added to node costs by the
caller). The graph is split into chains that are monotone in the node order; each sweep makes
the chains agree better and never lowers their summed minima, which is the bound (Kolmogorov,
Convergent Tree-Reweighted Message Passing, PAMI 2006).

Nodes of one level have no edge in common, so a level is one batch of flat array operations:
cells of all matrices are stored twice, ordered for minimising over either end.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.ilp.problem import Vector
from planner.ilp.work import Work

Ints = NDArray[np.int64]


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
    cells: Vector  # costs ordered by (edge, other label, own label)
    cell_send: Ints  # per cell: which (edge, own label)
    cell_start: Ints  # where each (edge, other label) starts
    out_message: Ints  # flat index of each message entry that is written
    out_start: Ints  # where each edge's message starts in `out_message`
    out_edge: Ints  # per message entry: which edge of the batch


class Messages:
    """Messages of a graph. Label columns are as in `profile.Profile`."""

    def __init__(self, work: Work) -> None:
        self.nodes = work.nodes()
        self.sizes = np.array([work.size(n) for n in self.nodes], dtype=np.int64)
        self.first = np.concatenate([[0], np.cumsum(self.sizes)])
        self.labels = int(self.first[-1])
        self.unary = np.concatenate([np.zeros(0), *(work.costs[n] for n in self.nodes)])
        index = {n: k for k, n in enumerate(self.nodes)}
        edges = [
            (index[i], index[j], cost)
            for i in self.nodes for j, cost in work.adj[i].items() if i < j
        ]  # fmt: skip
        self.edges = edges
        self._layout()
        self.forward = self._batches(self._levels(up=True), up=True)
        self.backward = self._batches(self._levels(up=False), up=False)
        self.message = np.zeros(self.message_count)

    def _layout(self) -> None:
        """Message e,j (at the labels of the higher end j) and e,i, one after the other."""
        at = 0
        self.to_high: list[int] = []
        self.to_low: list[int] = []
        self.above: list[list[int]] = [[] for _ in self.nodes]
        self.below: list[list[int]] = [[] for _ in self.nodes]
        for e, (i, j, _) in enumerate(self.edges):
            self.to_high.append(at)
            at += int(self.sizes[j])
            self.to_low.append(at)
            at += int(self.sizes[i])
            self.above[i].append(e)
            self.below[j].append(e)
        self.message_count = at

    def _levels(self, *, up: bool) -> list[list[int]]:
        """Nodes by length of the longest monotone path that leads to them."""
        count = len(self.nodes)
        level = [0] * count
        for n in range(count) if up else range(count - 1, -1, -1):
            for e in self.below[n] if up else self.above[n]:
                other = self.edges[e][0] if up else self.edges[e][1]
                level[n] = max(level[n], level[other] + 1)
        groups: list[list[int]] = [[] for _ in range(max(level, default=-1) + 1)]
        for n in range(count):
            groups[level[n]].append(n)
        return groups

    def _batches(self, groups: list[list[int]], *, up: bool) -> list[Batch]:
        return [self._batch(group, up=up) for group in groups]

    def _batch(self, group: list[int], *, up: bool) -> Batch:
        label_at: list[Ints] = []
        starts: list[int] = []
        in_message: list[Ints] = []
        in_label: list[Ints] = []
        gamma: list[Vector] = []
        free: list[float] = []
        sends: list[tuple[int, int, int]] = []  # (edge, own size, label start)
        at = 0
        for n in group:
            size = int(self.sizes[n])
            starts.append(at)
            label_at.append(self.first[n] + np.arange(size))
            for e in self.below[n]:
                in_message.append(self.to_high[e] + np.arange(size))
                in_label.append(at + np.arange(size))
            for e in self.above[n]:
                in_message.append(self.to_low[e] + np.arange(size))
                in_label.append(at + np.arange(size))
            outgoing = self.above[n] if up else self.below[n]
            chains = max(len(self.above[n]), len(self.below[n]), 1)
            gamma.append(np.full(size, 1.0 / chains))
            free.append(1.0 - len(outgoing) / chains)
            sends += [(e, size, at) for e in outgoing]
            at += size
        sent = self._sends(sends, up=up)
        return Batch(
            np.array(group), np.concatenate(label_at), np.array(starts),
            np.repeat(np.arange(len(group)), [int(self.sizes[n]) for n in group]),
            _cat(in_message), _cat(in_label), np.concatenate(gamma), np.array(free), *sent,
        )  # fmt: skip

    def _sends(
        self, sends: list[tuple[int, int, int]], *, up: bool
    ) -> tuple[Ints, Ints, Vector, Ints, Ints, Ints, Ints, Ints]:
        """Index arrays of the messages along `sends`."""
        label: list[Ints] = []
        back: list[Ints] = []
        cells: list[Vector] = []
        cell_send: list[Ints] = []
        cell_start: list[Ints] = []
        out: list[Ints] = []
        out_start: list[int] = []
        out_edge: list[Ints] = []
        sent = cell = entry = 0
        for k, (e, size, at) in enumerate(sends):
            cost = self.edges[e][2].T if up else self.edges[e][2]  # [other, own]
            other = cost.shape[0]
            label.append(at + np.arange(size))
            back.append((self.to_low[e] if up else self.to_high[e]) + np.arange(size))
            cells.append(np.ascontiguousarray(cost).ravel())
            cell_send.append(np.tile(sent + np.arange(size), other))
            cell_start.append(cell + np.arange(other) * size)
            out.append((self.to_high[e] if up else self.to_low[e]) + np.arange(other))
            out_start.append(entry)
            out_edge.append(np.full(other, k))
            sent += size
            cell += size * other
            entry += other
        values = np.concatenate([np.zeros(0), *cells])
        return (
            _cat(label), _cat(back), values, _cat(cell_send), _cat(cell_start), _cat(out),
            np.array(out_start, dtype=np.int64), _cat(out_edge),
        )  # fmt: skip

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
        values = np.minimum.reduceat(batch.cells + give[batch.cell_send], batch.cell_start)
        floor = np.minimum.reduceat(values, batch.out_start)
        self.message[batch.out_message] = values - floor[batch.out_edge]
        return float(floor.sum())


def _cat(parts: list[Ints]) -> Ints:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
