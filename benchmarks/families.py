"""Sharding problems from scratch, of any size: layers, a backward pass, resharding, liveness.

    python benchmarks/families.py OUT.json[.gz] [--nodes 65000] [--mesh 2,4,4] [--slack 1.1]
                                  [--cross 0.02] [--forbidden 0] [--parts 1] [--seed 0]

Only making up problems belongs here. A strategy says which dimension each mesh axis divides (or
none). Half of the nodes follow another (every other pair is forbidden), the others pay for
resharding by how the specs differ. Activations wait for the backward pass, parameters stay.
`--cross` adds edges between far nodes, `--forbidden` forbids pairs at random (never those of the
most divided strategies, so that some choice is left), `--parts` makes components that share
nothing but memory; the limit is `--slack` times the least possible peak.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from variants import text

from planner.ilp.contest_reader import FORBIDDEN, RawProblem

Ints = NDArray[np.int64]
PER_LAYER = 24
"""Nodes of the forward half of a layer."""
FOLLOWS = 0.5
SIZES = (2**10, 2**14, 2**18, 2**20)
"""Elements of tensors by rank: biases are small, activations large."""


@dataclass
class Builder:
    """Grows the lists of a problem; `specs[n]` [strategies, axes] names dimensions (0: none)."""

    mesh: tuple[int, ...]
    rng: np.random.Generator
    specs: list[Ints] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    spans: list[list[int]] = field(default_factory=list)
    costs: list[Ints] = field(default_factory=list)
    usages: list[Ints] = field(default_factory=list)
    edges: list[tuple[int, int]] = field(default_factory=list)
    tables: list[Ints] = field(default_factory=list)
    known: dict[tuple[int, int, int], Ints] = field(default_factory=dict)

    def node(self, rank: int, size: int, start: int, stop: int) -> int:
        """A tensor of so many dimensions and elements, live in [start, stop)."""
        specs = np.array(list(itertools.product(range(rank + 1), repeat=len(self.mesh))))
        pieces = np.where(specs > 0, np.array(self.mesh), 1).prod(axis=1)
        work = np.where(self.rng.random(len(specs)) < 0.3, size * 3 // pieces, 0)
        self.specs.append(specs)
        self.sizes.append(size)
        self.spans.append([start, stop])
        self.costs.append(work.astype(np.int64))
        self.usages.append(np.maximum(size // pieces, 1))
        return len(self.specs) - 1

    def reshard(self, i: int, j: int) -> Ints:
        """Elements moved from any spec of `i` to any of `j`; shared between equal pairs."""
        ranks = int(self.specs[i].max()), int(self.specs[j].max())
        key = (*ranks, self.sizes[i])
        if key not in self.known:
            a, b = self.specs[i][:, None, :], self.specs[j][None, :, :]
            ways = np.array(self.mesh)
            left = np.where(a > 0, ways, 1).prod(axis=2)
            gathered = np.where((a != b) & (b == 0), ways - 1, 0).sum(axis=2)
            moved = ((a != b) & (a > 0) & (b > 0)).sum(axis=2)
            self.known[key] = (self.sizes[i] * (gathered + 2 * moved) // left).astype(np.int64)
        return self.known[key]

    def connect(self, i: int, j: int, forbidden: float, follow: bool = False) -> None:
        if follow and len(self.specs[i]) == len(self.specs[j]):
            table = np.where(np.eye(len(self.specs[i]), dtype=bool), 0, FORBIDDEN)
        else:
            table = self.reshard(i, j)
        if forbidden and not follow:
            bad = self.rng.random(table.shape) < forbidden
            bad[(self.specs[i] > 0).all(axis=1)[:, None] & (self.specs[j] > 0).all(axis=1)] = False
            table = np.where(bad, FORBIDDEN, table)
        self.edges.append((i, j))
        self.tables.append(np.asarray(table, dtype=np.int64))


def part(build: Builder, nodes: int, forbidden: float) -> None:
    """One network of about so many nodes: forward, then backward in reverse."""
    rng, first = build.rng, len(build.specs)
    half = nodes // 2
    ranks = rng.integers(1, 4, PER_LAYER)
    sizes = [int(rng.choice(SIZES[r:])) if r < 3 else SIZES[3] for r in ranks]
    follows = rng.random(PER_LAYER) < FOLLOWS
    back = rng.integers(1, 4, PER_LAYER)
    for k in range(half):
        at = k % PER_LAYER
        waits = rng.random() < 0.4
        parameter = at % 8 == 0
        stop = nodes if parameter else (nodes - k if waits else k + int(rng.integers(2, 6)))
        n = build.node(int(ranks[at]), sizes[at], 0 if parameter else k, stop)
        if k:
            build.connect(n - min(int(back[at]), k), n, forbidden, follow=bool(follows[at]))
        if k >= PER_LAYER and at == PER_LAYER - 1:  # a residual connection
            build.connect(n - PER_LAYER, n, forbidden)
    for k in range(half, 2 * half):
        mirror = first + 2 * half - 1 - k
        n = build.node(int(build.specs[mirror].max()), build.sizes[mirror], k, k + 3)
        build.connect(n - 1, n, forbidden)
        build.connect(mirror, n, forbidden, follow=rng.random() < FOLLOWS)


def problem(
    nodes: int, mesh: tuple[int, ...], slack: float, cross: float, forbidden: float, parts: int,
    seed: int,
) -> RawProblem:  # fmt: skip
    build = Builder(mesh, np.random.default_rng(seed))
    for _ in range(parts):
        part(build, nodes // parts, forbidden)
    count = len(build.specs)
    for _ in range(int(cross * count)):
        i, j = sorted(build.rng.choice(count, 2, replace=False).tolist())
        build.connect(i, j, forbidden)
    spans = np.array(build.spans, dtype=np.int64)
    change = np.zeros(int(spans.max()) + 1, dtype=np.int64)
    least = np.array([u.min() for u in build.usages])
    np.add.at(change, spans[:, 0], least)
    np.add.at(change, spans[:, 1], -least)
    limit = int(np.cumsum(change).max() * slack)
    return RawProblem(
        f"family-{seed}", spans, build.costs, build.usages,
        np.array(build.edges, dtype=np.int64), [t.ravel() for t in build.tables], limit,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out")
    parser.add_argument("--nodes", type=int, default=65_000)
    parser.add_argument("--mesh", default="2,4,4", type=lambda s: tuple(map(int, s.split(","))))
    parser.add_argument("--slack", type=float, default=1.1)
    parser.add_argument("--cross", type=float, default=0.02)
    parser.add_argument("--forbidden", type=float, default=0.0)
    parser.add_argument("--parts", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    o = parser.parse_args()
    raw = problem(o.nodes, o.mesh, o.slack, o.cross, o.forbidden, o.parts, o.seed)
    opener = gzip.open if o.out.endswith(".gz") else open
    with opener(o.out, "wt") as file:
        file.writelines(text(raw))


if __name__ == "__main__":
    main()
