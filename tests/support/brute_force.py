"""All plans of a small flow, each lowered whole and read: the yardstick for the ILP.

Complete enumeration where the plans are few. Else depth first, leaving out a branch only if the
kernels and conversions already decided, with the least that all others can add (known exactly,
by eliminating one decision after the other), cost more than a plan that fits; or if the inputs
and what one loop stacks, which coexist for certain, take more than the limit. At every plan
reached the sum of kernels and conversions must be the lowered program's time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import inf, isinf, prod

import numpy as np
from both_prices import counted
from random_plans import Node, PlanDrawer

from costmodels.collectives import collective_seconds
from costmodels.memory import read_memory
from costmodels.pricing import instruction_seconds, kernel_seconds
from costmodels.program import ITEM_BYTES
from costmodels.retiling import retiling_seconds
from meshes import LogicalMesh
from planner.lowering.lower import lower
from planner.lowering.lower_op import lower_op
from planner.plan import Plan
from planner.sharding.choices import Choice
from planner.sharding.flow import Conversion, Flow, Place
from planner.sharding.reshard import Resharder
from planner.sharding.spec import Spec

SLACK = 1e-9  # relative: sums in another order differ in the last digits


@dataclass(frozen=True)
class Leaf:
    plan: Plan
    seconds: float
    peak_bytes: int


class TooMany(Exception):
    """A longer search than the caller wants to wait for."""


Table = tuple[tuple[int, ...], np.ndarray]  # positions of decisions, seconds by their options
LARGEST = 3_000_000  # cells of a table


class BruteForce:
    def __init__(self, flow: Flow, mesh: LogicalMesh) -> None:
        self.flow, self.mesh = flow, mesh
        self.drawer = PlanDrawer(flow, mesh.axes)
        self.options = self.drawer.options
        self.sizes = dict(mesh.axes)
        self.resharder = Resharder(
            self.sizes, lambda kind, axes, size: collective_seconds(mesh, kind, axes, size),
            flow.uneven, partial(retiling_seconds, mesh),
        )  # fmt: skip
        self.tensors = flow.graph.all_tensors()
        self.nodes = self._ordered()
        self.own = self._tables()
        self.later = self._eliminated()
        self.coexist = self._coexisting()

    @property
    def plans(self) -> int:
        """Number of combinations, possible or not."""
        return prod(len(self.options[node]) for node in self.nodes)

    def every(self) -> Iterator[Leaf]:
        """All plans that have a path for every conversion."""
        yield from self._from([], 0.0, [inf], inf)

    def best(self, limit: float, at_most: int, below: float = inf) -> Leaf | None:
        """A cheapest plan whose peak is within `limit` and that takes less than `below` seconds;
        TooMany after `at_most` plans read."""
        bound = [below]
        found = None
        for count, leaf in enumerate(self._from([], 0.0, bound, limit)):
            if count == at_most:
                raise TooMany
            if leaf.peak_bytes <= limit and leaf.seconds < bound[0]:
                found, bound[0] = leaf, leaf.seconds
        return found

    def _from(
        self, taken: list[int], seconds: float, bound: list[float], limit: float
    ) -> Iterator[Leaf]:
        i = len(taken)
        if i == len(self.nodes):
            yield self._leaf(taken, seconds)
            return
        ranked = []
        for option in range(len(self.options[self.nodes[i]])):
            grown = [*taken, option]
            added = sum(_at(table, grown) for table in self.own[i])
            rest = sum(_at(table, grown) for table in self.later[i])
            ranked.append((seconds + added + rest, option, added))
        for least, option, added in sorted(ranked):
            if isinf(least) or least >= bound[0] * (1 - SLACK):
                break
            grown = [*taken, option]
            if self._least_bytes(grown) <= limit:
                yield from self._from(grown, seconds + added, bound, limit)

    def _leaf(self, taken: list[int], seconds: float) -> Leaf:
        chosen = {n: self.options[n][k] for n, k in zip(self.nodes, taken, strict=True)}
        plan = self.drawer.plan(chosen)
        program = counted(lower(self.flow, plan, self.resharder), self.mesh)
        whole = sum(n * instruction_seconds(self.mesh, i) for i, n in program.instructions())
        assert abs(whole - seconds) <= SLACK * whole
        return Leaf(plan, whole, read_memory(program).peak_bytes)

    def _tables(self) -> list[list[Table]]:
        """Seconds that each decision adds to those before it."""
        found: list[list[Table]] = []
        for i, node in enumerate(self.nodes):
            found.append([((i,), np.array(self._kernels(node)))])
        for c in self.flow.conversions:
            i, j = (self.nodes.index(self.drawer.node(p)) for p in (c.source, c.target))
            matrix = self._conversion(c)
            if i == j:
                found[i].append(((i,), np.diagonal(matrix)))
            else:
                found[max(i, j)].append(((i, j), matrix) if i < j else ((j, i), matrix.T))
        return found

    def _conversion(self, c: Conversion) -> np.ndarray:
        sources = self._specs(c.source)
        targets = self._specs(c.target)
        item = ITEM_BYTES[c.dtype]
        return c.times * self.resharder.matrix(sources, targets, c.shape, item, c.reduce)

    def _specs(self, place: Place) -> list[Spec]:
        node = self.drawer.node(place)
        return [self.drawer.spec(place, {node: option}) for option in self.options[node]]

    def _eliminated(self) -> list[list[Table]]:
        """For every position the least that all later decisions add to those up to it."""
        pending: list[tuple[int, Table]] = []
        later: list[list[Table]] = [[] for _ in self.nodes]
        for i in reversed(range(len(self.nodes))):
            later[i] = [table for _, table in pending]
            mine = [t for t in (*self.own[i], *later[i]) if i in t[0]]
            pending = [(j, t) for j, t in pending if i not in t[0]]
            axes = tuple(sorted({v for scope, _ in mine for v in scope}))
            if prod(len(self.options[self.nodes[v]]) for v in axes) > LARGEST:
                raise TooMany
            total = sum(_spread(t, axes) for t in mine)
            pending.append((i, (axes[:-1], np.min(total, axis=-1))))  # i is the last of axes
        return later

    def _coexisting(self) -> list[list[tuple[int, list[int]]]]:
        """Groups of homes that are live together: (position, bytes of every option)."""
        flow = self.flow
        inputs = {flow.home_of[name][0] for name in flow.graph.inputs}
        groups = [
            inputs | {flow.home_of[s.outer][0] for s in site.loop.writes}
            for site in flow.loops.values()
        ]
        return [[self._sizes(home) for home in sorted(group)] for group in groups or [inputs]]

    def _sizes(self, number: int) -> tuple[int, list[int]]:
        home = self.flow.homes[number]
        node: Node = ("home", number)
        item = ITEM_BYTES[home.dtype]
        local = [spec.local_shape(home.shape, self.sizes) for spec in self.options[node]]  # type: ignore[attr-defined]
        return self.nodes.index(node), [prod(shape) * item for shape in local]

    def _least_bytes(self, taken: list[int]) -> int:
        return max(
            sum(size[taken[i]] if i < len(taken) else min(size) for i, size in group)
            for group in self.coexist
        )

    def _kernels(self, node: Node) -> list[float]:
        """Seconds of the op (and its recomputation) under every choice."""
        found = [0.0] * len(self.drawer.options[node])
        for site in self.flow.sites.values():
            if node != ("op", site.op.origin or site.op.name):
                continue
            for k, choice in enumerate(self.drawer.options[node]):
                assert isinstance(choice, Choice)
                kernel = lower_op(site.op, choice, self.tensors, self.sizes)
                found[k] += site.times * kernel_seconds(self.mesh.chip, kernel)
        return found

    def _ordered(self) -> list[Node]:
        """Neighbours soon after each other, so that conversions are decided early."""
        links: dict[Node, set[Node]] = {node: set() for node in self.drawer.options}
        for c in self.flow.conversions:
            a, b = self.drawer.node(c.source), self.drawer.node(c.target)
            if a != b:
                links[a].add(b)
                links[b].add(a)
        order: list[Node] = []
        while len(order) < len(links):
            left = [n for n in links if n not in order]
            order.append(
                max(left, key=lambda n: (len(links[n] & set(order)), -len(links[n] - set(order))))
            )
        return order


def _at(table: Table, taken: list[int]) -> float:
    scope, seconds = table
    return float(seconds[tuple(taken[v] for v in scope)])


def _spread(table: Table, axes: tuple[int, ...]) -> np.ndarray:
    """The table with one dimension for every one of `axes`, for broadcasting."""
    scope, seconds = table
    sizes = iter(seconds.shape)
    return seconds.reshape([next(sizes) if v in scope else 1 for v in axes])
