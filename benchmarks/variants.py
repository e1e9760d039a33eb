"""Variants of contest problems: what a robust solver must not notice, and larger relatives.

    python benchmarks/variants.py permute|tighter|looser|scaled|product PROBLEM.json.gz OUT.json

Only rewriting problems belongs here. `permute` numbers the nodes at random (and shuffles edges
and their ends), `tighter` and `looser` move the limit by 5 %, `scaled` multiplies all costs by
37. `product` gives every node pairs of its strategies, as a second mesh axis would: costs and
edges add up, usages multiply; the file is 20 to 100 times larger and tests reader and memory.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from planner.ilp.contest_reader import FORBIDDEN, RawProblem, read

Ints = NDArray[np.int64]
SCALE = 37
SECOND_AXIS = 3
"""Costs along the second axis are this fraction of those along the first: links differ."""
MOST_STRATEGIES = 60
"""Strategies a node of `product` keeps."""


def permute(raw: RawProblem, seed: int = 0) -> RawProblem:
    """The same problem under random numbers; every second edge is turned around."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(raw.costs))
    new = np.empty_like(order)
    new[order] = np.arange(len(order))
    edges: list[tuple[int, int]] = []
    tables: list[Ints] = []
    for e in rng.permutation(len(raw.edges)).tolist():
        i, j = raw.edges[e].tolist()
        table = raw.edge_costs[e]
        if rng.random() < 0.5:
            table = table.reshape(len(raw.costs[i]), -1).T.ravel()
            i, j = j, i
        edges.append((int(new[i]), int(new[j])))
        tables.append(table)
    return RawProblem(
        raw.name, raw.intervals[order], [raw.costs[n] for n in order],
        [raw.usages[n] for n in order], np.array(edges, dtype=np.int64), tables, raw.usage_limit,
    )  # fmt: skip


def with_limit(raw: RawProblem, factor: float) -> RawProblem:
    return RawProblem(
        raw.name, raw.intervals, raw.costs, raw.usages, raw.edges, raw.edge_costs,
        int(raw.usage_limit * factor),
    )  # fmt: skip


def scaled(raw: RawProblem) -> RawProblem:
    def times(values: Ints) -> Ints:
        return np.where(values < FORBIDDEN, values * SCALE, values)

    return RawProblem(
        raw.name, raw.intervals, [times(c) for c in raw.costs], raw.usages, raw.edges,
        [times(c) for c in raw.edge_costs], raw.usage_limit,
    )  # fmt: skip


def product(raw: RawProblem) -> RawProblem:
    """Strategies (s, t): cost c[s] + c[t]/3, usage u[s]·u[t]/max u, edges alike."""
    pairs = [_pairs(len(c)) for c in raw.costs]

    def vector(values: Ints, n: int) -> Ints:
        s, t = pairs[n]
        return np.where(
            np.maximum(values[s], values[t]) >= FORBIDDEN,
            FORBIDDEN, values[s] + values[t] // SECOND_AXIS,
        )  # fmt: skip

    def usage(values: Ints, n: int) -> Ints:
        s, t = pairs[n]
        most = max(1, int(values.max()))
        return np.round(values[s] * (values[t] / most)).astype(np.int64)

    def table(values: Ints, i: int, j: int) -> Ints:
        square = values.reshape(len(raw.costs[i]), len(raw.costs[j]))
        first = square[np.ix_(pairs[i][0], pairs[j][0])]
        second = square[np.ix_(pairs[i][1], pairs[j][1])]
        forbidden = np.maximum(first, second) >= FORBIDDEN
        return np.where(forbidden, FORBIDDEN, first + second // SECOND_AXIS).ravel()

    nodes = range(len(raw.costs))
    usages = [usage(raw.usages[n], n) for n in nodes]
    return RawProblem(
        raw.name, raw.intervals, [vector(raw.costs[n], n) for n in nodes], usages, raw.edges,
        [table(v, i, j) for (i, j), v in zip(raw.edges.tolist(), raw.edge_costs, strict=True)],
        max(int(raw.usage_limit * _shrunk(raw, usages)), 1),
    )  # fmt: skip


def _pairs(size: int) -> tuple[Ints, Ints]:
    """All pairs; where they are too many, those nearest to the diagonal."""
    s, t = (a.ravel() for a in np.indices((size, size)))
    kept = np.sort(np.argsort(np.abs(s - t), kind="stable")[:MOST_STRATEGIES])
    return s[kept], t[kept]


def _shrunk(raw: RawProblem, usages: list[Ints]) -> float:
    """How much the least possible peak changed: the limit stays as tight as it was."""

    def least(amounts: list[Ints]) -> int:
        starts, stops = raw.intervals.T
        change = np.zeros(int(stops.max(initial=0)) + 1, dtype=np.int64)
        low = np.array([u.min() for u in amounts], dtype=np.int64)
        np.add.at(change, starts, low)
        np.add.at(change, stops, -low)
        return int(np.cumsum(change).max())

    return least(usages) / max(1, least(raw.usages))


VARIANTS = {
    "permute": permute,
    "tighter": lambda raw: with_limit(raw, 0.95),
    "looser": lambda raw: with_limit(raw, 1.05),
    "scaled": scaled,
    "product": product,
}


def text(raw: RawProblem) -> Iterator[str]:
    """The contest's JSON in pieces: a large problem never exists as one string."""
    yield '{"problem": {"name": ' + json.dumps(raw.name) + ', "nodes": {"intervals": '
    yield json.dumps(raw.intervals.tolist())
    yield from _lists(', "costs": ', raw.costs)
    yield from _lists(', "usages": ', raw.usages)
    yield '}, "edges": {"nodes": ' + json.dumps(raw.edges.tolist())
    yield from _lists(', "costs": ', raw.edge_costs)
    yield '}, "usage_limit": ' + str(raw.usage_limit) + "}}\n"


def _lists(head: str, arrays: list[Ints]) -> Iterator[str]:
    yield head + "["
    for k, values in enumerate(arrays):
        yield (", " if k else "") + json.dumps(values.tolist())
    yield "]"


def main(kind: str, source: str, target: str) -> None:
    raw = VARIANTS[kind](read(Path(source)))
    if target.endswith(".gz"):
        with gzip.open(target, "wt", compresslevel=1) as packed:
            packed.writelines(text(raw))
        return
    with open(target, "w") as plain:
        plain.writelines(text(raw))


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] not in VARIANTS:
        sys.exit(__doc__)
    main(*sys.argv[1:])
