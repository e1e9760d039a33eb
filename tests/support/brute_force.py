"""All plans of a small flow, each lowered whole and read: the yardstick for the ILP.

Complete enumeration where the plans are few. Else depth first, leaving out a branch only if

- the kernels and conversions already decided, with the cheapest kernel for every other op, cost
  more than a plan that fits; at every plan reached this sum must be the lowered program's time;
- the inputs, what one loop stacks and one result in it take more than the limit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf, isinf, prod

from random_plans import Node, PlanDrawer

from costmodels.memory import read_memory
from costmodels.pricing import instruction_seconds, kernel_seconds, move_seconds
from costmodels.program import ITEM_BYTES
from meshes import LogicalMesh
from planner.lowering.lower import lower
from planner.lowering.lower_op import lower_op
from planner.plan import Plan
from planner.sharding.choices import Choice
from planner.sharding.flow import Flow
from planner.sharding.reshard import Resharder

SLACK = 1e-9  # relative: sums in another order differ in the last digits


@dataclass(frozen=True)
class Leaf:
    plan: Plan
    seconds: float
    peak_bytes: int
    step: str


class TooMany(Exception):
    """More plans than the caller wants to wait for."""


class BruteForce:
    def __init__(self, flow: Flow, mesh: LogicalMesh) -> None:
        self.flow, self.mesh = flow, mesh
        self.drawer = PlanDrawer(flow, mesh.axes)
        self.sizes = dict(mesh.axes)
        self.resharder = Resharder(
            self.sizes, lambda kind, axes, size: move_seconds(mesh, kind, axes, size)
        )
        self.tensors = flow.graph.all_tensors()
        self.nodes = self._ordered()
        self.own = {node: self._kernels(node) for node in self.nodes}
        later = [min(self.own[node]) for node in self.nodes]
        self.rest = [sum(later[i:]) for i in range(len(later) + 1)]
        self.inside = self._inside()
        self.bytes = {node: self._bytes(node) for node in self.nodes}
        self.seen = 0

    @property
    def plans(self) -> int:
        """Number of combinations, possible or not."""
        return prod(len(self.drawer.options[node]) for node in self.nodes)

    def every(self) -> Iterator[Leaf]:
        """All plans that have a path for every conversion."""
        yield from self._from(0, {}, 0.0, [inf], inf)

    def best(self, limit: float, at_most: int, below: float = inf) -> Leaf | None:
        """A cheapest plan whose peak is within `limit` and that takes less than `below` seconds;
        TooMany after `at_most` plans read."""
        bound = [below]
        found = None
        self.seen = 0
        for leaf in self._from(0, {}, 0.0, bound, limit):
            self.seen += 1
            if self.seen > at_most:
                raise TooMany
            if leaf.peak_bytes <= limit and leaf.seconds < bound[0]:
                found, bound[0] = leaf, leaf.seconds
        return found

    def _from(
        self, i: int, taken: dict[Node, object], seconds: float, bound: list[float],
        limit: float,
    ) -> Iterator[Leaf]:  # fmt: skip
        if i == len(self.nodes):
            yield self._leaf(taken, seconds)
            return
        node = self.nodes[i]
        ranked = []
        for option, own in zip(self.drawer.options[node], self.own[node], strict=True):
            added = own + self._conversions(node, {**taken, node: option})
            ranked.append((added, len(ranked), option))
        for added, _, option in sorted(ranked, key=lambda r: r[:2]):
            least = seconds + added + self.rest[i + 1]
            if isinf(added) or least >= bound[0] * (1 - SLACK):
                break
            grown = {**taken, node: option}
            if self._least_bytes(grown) <= limit:
                yield from self._from(i + 1, grown, seconds + added, bound, limit)

    def _leaf(self, taken: dict[Node, object], seconds: float) -> Leaf:
        plan = self.drawer.plan(taken)
        program = lower(self.flow, plan, self.resharder)
        whole = sum(n * instruction_seconds(self.mesh, i) for i, n in program.instructions())
        assert abs(whole - seconds) <= SLACK * whole
        memory = read_memory(program)
        return Leaf(plan, whole, memory.peak_bytes, memory.step)

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

    def _inside(self) -> dict[Node, str]:
        """Inputs (""), and the loop (or "-") that what a node makes surely occupies memory in."""
        flow = self.flow
        found: dict[Node, str] = {("home", flow.home_of[n][0]): "" for n in flow.graph.inputs}
        for site in flow.loops.values():
            for stack in site.loop.writes:
                found.setdefault(("home", flow.home_of[stack.outer][0]), site.loop.name)
        for op_site in flow.sites.values():
            loops = [s for s in flow.loops.values() if s.enter < op_site.step < s.stop]
            name = op_site.op.origin or op_site.op.name
            found["op", name] = max(loops, key=lambda s: s.enter).loop.name if loops else "-"
        return found

    def _bytes(self, node: Node) -> dict[object, int]:
        """Bytes of the tensor that every option of an input, a stack or an op makes."""
        options = self.drawer.options[node]
        if node not in self.inside:
            return dict.fromkeys(options, 0)
        if node[0] == "home":
            home = self.flow.homes[int(node[1])]
            shape, item = home.shape, ITEM_BYTES[home.dtype]
        else:
            site = next(s for s in self.flow.sites.values() if s.op.name == node[1])
            out = self.tensors[site.op.outs[0]]
            if out.name in self.flow.graph.aliases:
                return dict.fromkeys(options, 0)
            shape, item = out.shape, ITEM_BYTES[out.dtype]
            specs = [c.result(site.op.rule, 0, list(self.sizes)) for c in options]  # type: ignore[attr-defined]
            return {
                c: prod(s.local_shape(shape, self.sizes)) * item
                for c, s in zip(options, specs, strict=True)
            }
        return {s: prod(s.local_shape(shape, self.sizes)) * item for s in options}  # type: ignore[attr-defined]

    def _least_bytes(self, taken: dict[Node, object]) -> int:
        """Bytes that coexist for certain: inputs, a loop's stacks and its largest result."""
        inputs, stacks, results = 0, Counter[str](), Counter[str]()
        for node in self.nodes:
            where = self.inside.get(node)
            if where is None:
                continue
            known = self.bytes[node]
            size = known[taken[node]] if node in taken else min(known.values())
            if where == "":
                inputs += size
            elif node[0] == "home":
                stacks[where] += size
            else:
                results[where] = max(results[where], size)
        return inputs + max((stacks[w] + results[w] for w in {*stacks, *results}), default=0)

    def _conversions(self, node: Node, taken: dict[Node, object]) -> float:
        """Seconds of the conversions that `node` completes."""
        total = 0.0
        for c in self.flow.conversions:
            ends = {self.drawer.node(c.source), self.drawer.node(c.target)}
            if node in ends and ends <= taken.keys():
                source = self.drawer.spec(c.source, taken)
                target = self.drawer.spec(c.target, taken)
                item = ITEM_BYTES[c.dtype]
                total += c.times * self.resharder.seconds(source, target, c.shape, item, c.reduce)
        return total

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
