"""One ILP for sharding and saving: the strategies of a `Space`, times modes.

The space is that of a step with the policy `open` (planner.graph.recompute), in which every value
that a backward body needs may be kept or computed again. Nodes have modes:

    a stack of kept values         PRESENT  it is there          ABSENT   it takes no memory
    an op with a recomputation     ONCE     in the forward pass  AGAIN    in both
    a value of the backward body   KEPT     a slice of the stack as it lies
                                   COPIED   a slice, resharded for its readers
                                   REDONE   what the recomputation makes
                                   UNUSED   no op that runs reads it
    that value's home              VIEW     part of a stack      OWN      memory of its own

Which modes go together concerns two nodes at a time, so all of it is edges: a kept value needs
its stack, a redone one its op AGAIN, and an op that is run AGAIN none of its operands UNUSED.
Costs and usages of what is not executed count where the modes say so.

What is not exact is how long a value lives that only recomputations read: to the last of them,
whether that takes place or not. So the solution decides what is saved; the plan comes from the
ordinary ILP of that step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from planner.graph.core import Loop, Op
from planner.graph.recompute import AGAIN, CHOOSES, SAVED
from planner.ilp import Edge, Problem, Usage
from planner.sharding.flow import Conversion
from planner.sharding.formulate import Array, Key, Space, add_edge

PRESENT, ABSENT, ONCE, AGAIN_TOO, KEPT, COPIED, REDONE, UNUSED, VIEW, OWN, ALWAYS = (
    "present", "absent", "once", "again", "kept", "copied", "redone", "unused", "view", "own", "",
)  # fmt: skip
STACK, OP, VALUE, HOME = (
    (PRESENT, ABSENT), (ONCE, AGAIN_TOO), (KEPT, COPIED, REDONE, UNUSED), (VIEW, OWN),
)  # fmt: skip
ANYWHERE = (ABSENT, UNUSED)  # modes of things that are not there: one strategy is enough
HOME_OF = {KEPT: VIEW, COPIED: OWN, REDONE: OWN, UNUSED: VIEW}
RUNS, SKIPPED, IN_PLACE, FORBIDDEN = "runs", "skipped", "in place", "forbidden"


@dataclass(frozen=True)
class Fate:
    """What becomes of a conversion: it runs if its target (else source) is in one of `modes`.
    `of` says so by the modes of both ends, and which of them do not go together."""

    modes: tuple[str, ...]
    of: Callable[[str, str], str]
    by_target: bool = True


def _if_target(mode: str) -> Fate:
    return Fate((mode,), lambda _, target: RUNS if target == mode else SKIPPED)


def _kept(stack: str, value: str) -> str:
    """From a stack to the value that may be a slice of it."""
    if value not in (KEPT, COPIED):
        return SKIPPED
    if stack == ABSENT:
        return FORBIDDEN
    return IN_PLACE if value == KEPT else RUNS


def _redone(op: str, value: str) -> str:
    """From a recomputation to the value that may be its result."""
    if value != REDONE:
        return SKIPPED
    return RUNS if op == AGAIN_TOO else FORBIDDEN


def _homed(value: str, home: str) -> str:
    """From a value to its home."""
    if HOME_OF[value] != home:
        return FORBIDDEN
    return {KEPT: IN_PLACE, UNUSED: SKIPPED}.get(value, RUNS)


ALWAYS_RUNS = Fate((), lambda _, __: RUNS)
TO_STACK = _if_target(PRESENT)
TO_AGAIN = _if_target(AGAIN_TOO)
FROM_AGAIN = Fate(
    (AGAIN_TOO,), lambda source, _: RUNS if source == AGAIN_TOO else SKIPPED, by_target=False
)
FROM_STACK = Fate((COPIED,), _kept)
FROM_REDONE = Fate((REDONE,), _redone)
TO_HOME = Fate((COPIED, REDONE), _homed, by_target=False)


@dataclass
class SavingProgram:
    """The ILP over a space of an open step. Strategy m·n + i of a node with n specs or choices
    is the i-th of them in mode m; the nodes are those of the space."""

    space: Space
    values: dict[str, Op] = field(init=False)  # the ops that stand for a choice, by result
    again: dict[str, Op] = field(init=False)  # recomputations that may be left out, by name
    modes: list[tuple[str, ...]] = field(init=False)

    def __post_init__(self) -> None:
        graph = self.space.flow.graph
        self.values = {op.outs[0]: op for op, _ in graph.walk() if op.attrs.get(CHOOSES)}
        loops = [x for x in graph.loops() if self.values.keys() & x.body.tensors]
        self.again = {
            op.name: op for loop in loops for op in loop.body.nodes
            if isinstance(op, Op) and op.phase == "recompute" and op.origin
        }  # fmt: skip
        self.made = {o: op for op in self.again.values() for o in op.outs}
        self.stacks = {name.removesuffix(AGAIN) + SAVED for name in self.values}
        self.origins = {op.origin for op in self.again.values()}
        self.modes = [self._modes_of(key) for key in self.space.keys]
        self.needs = [need for loop in loops for need in self._needs(loop)]

    def _modes_of(self, key: Key) -> tuple[str, ...]:
        kind, name = key
        if kind == "op":
            return VALUE if name in self.values else OP if name in self.origins else (ALWAYS,)
        tensor = self.space.flow.homes[int(name)].tensor
        return STACK if tensor in self.stacks else HOME if tensor in self.values else (ALWAYS,)

    def _needs(self, loop: Loop) -> list[tuple[str, str | None]]:
        """(value or cheap recomputed tensor, the recomputation that reads it or None if what
        reads it is always run)."""
        handed_on = {k.exit for k in loop.carries} | {s.inner for s in loop.writes}
        reads: list[tuple[str, str | None]] = [(name, None) for name in handed_on]
        for node in loop.body.nodes:
            optional = isinstance(node, Op) and node.name in self.again
            reads += [(name, node.name if optional else None) for name in node.ins]
        chosen = {name for op in self.values.values() for name in op.ins}  # read by nothing else
        needed = self.values.keys() | (self.made.keys() - chosen)
        return [(name, reader) for name, reader in dict.fromkeys(reads) if name in needed]

    # ---- the problem ------------------------------------------------------------------------

    def problem(
        self, limit: float | None, active: Sequence[int], weights: Sequence[float]
    ) -> Problem:
        """As `Space.problem`."""
        space = self.space
        costs = self._costs()
        merged: dict[tuple[int, int], Array] = {}  # without modes
        own: dict[tuple[int, int], Array] = {}  # with modes
        usages: list[Usage] = []
        for weight, (c, seconds) in zip(weights, space.conversion_seconds, strict=True):
            by_spec = weight * seconds
            fate = self._fate(c)
            if limit is None or not space.touches(c, active):
                self._join(costs, own, c, by_spec, fate)
            elif fate is ALWAYS_RUNS:
                space.pair_node(costs, merged, usages, c, by_spec, active)
            else:
                self._join(costs, own, c, 0.0 * seconds, fate)
                self._pair_node(costs, own, usages, c, by_spec, active, fate)
        for (i, j), m in merged.items():
            add_edge(own, i, j, np.tile(m, (self._count(i), self._count(j))))
        self._add_needs(costs, own)
        if limit is not None:
            usages += self._usages(active)
        edges = tuple(Edge(i, j, m) for (i, j), m in own.items())
        return Problem(tuple(costs), edges, tuple(usages), limit)

    def _count(self, node: int) -> int:
        return len(self.modes[node]) if node < len(self.modes) else 1

    def _mask(self, node: int, *modes: str) -> NDArray[np.bool_]:
        """The strategies of a node that are of these modes."""
        of_mode = [mode in modes for mode in self.modes[node]]
        return np.repeat(of_mode, self.space.strategies(node))

    def _costs(self) -> list[Array]:
        space = self.space
        found = [np.zeros(space.strategies(i) * self._count(i)) for i in range(len(space.keys))]
        for site in space.flow.sites.values():
            op = site.op
            if op.outs[0] in self.values:
                continue
            node = space.node_of(op)
            each = np.tile(space.site_seconds[op.name], self._count(node))
            found[node] += each * self._mask(node, AGAIN_TOO) if op.name in self.again else each
        for i, modes in enumerate(self.modes):
            for m, mode in enumerate(modes):
                if mode in ANYWHERE:
                    n = space.strategies(i)
                    found[i][m * n + 1 : (m + 1) * n] = np.inf
        return found

    def _fate(self, c: Conversion) -> Fate:
        space = self.space
        target, source = c.target, c.source
        if target.kind == "home" and self.modes[space.number[space.key(target)]] == STACK:
            return TO_STACK
        if target.kind == "operand":
            op = space.flow.sites[target.op].op
            if op.outs[0] in self.values:
                return FROM_REDONE if target.slot else FROM_STACK
            if op.name in self.again:
                return TO_AGAIN
        if source.kind == "result":
            made = space.flow.sites[source.op].op
            if made.outs[0] in self.values and target.kind == "home":
                homed = space.flow.homes[target.home].tensor in self.values
                return TO_HOME if homed else ALWAYS_RUNS
            if made.name in self.again:
                return FROM_AGAIN
        return ALWAYS_RUNS

    def _join(
        self, costs: list[Array], own: dict[tuple[int, int], Array], c: Conversion, m: Array,
        fate: Fate,
    ) -> None:  # fmt: skip
        space = self.space
        sources, rows = space.rows(c.source)
        targets, columns = space.rows(c.target)
        i, j = space.number[space.key(c.source)], space.number[space.key(c.target)]
        in_place = np.where([[s == t for t in targets] for s in sources], 0.0, np.inf)
        table = {
            RUNS: m, SKIPPED: np.zeros_like(m), IN_PLACE: in_place,
            FORBIDDEN: np.full_like(m, np.inf),
        }  # fmt: skip
        blocks = [
            [table[fate.of(s, t)][rows][:, columns] for t in self.modes[j]] for s in self.modes[i]
        ]
        whole = np.block(blocks)
        if i == j:
            costs[i] += np.diagonal(whole)
        else:
            add_edge(own, i, j, whole)

    def _pair_node(
        self, costs: list[Array], own: dict[tuple[int, int], Array], usages: list[Usage],
        c: Conversion, by_spec: Array, active: Sequence[int], fate: Fate,
    ) -> None:  # fmt: skip
        """That of `Space`, with one more strategy: the conversion does not run."""
        space = self.space
        joined: dict[tuple[int, int], Array] = {}
        counted: list[Usage] = []
        space.pair_node(costs, joined, counted, c, by_spec, active)
        costs[-1] = np.append(costs[-1], 0.0)
        decides = space.number[space.key(c.target if fate.by_target else c.source)]
        for (i, node), m in joined.items():
            whole = np.pad(np.tile(m, (self._count(i), 1)), ((0, 0), (0, 1)))
            if i == decides:
                runs = self._mask(i, *fate.modes)
                whole[runs, -1] = np.inf
                whole[~runs, :-1] = np.inf
            add_edge(own, i, node, whole)
        usages += [replace(u, amount=np.append(u.amount, 0.0)) for u in counted]

    def _add_needs(self, costs: list[Array], own: dict[tuple[int, int], Array]) -> None:
        number = self.space.number
        for name, reader in self.needs:
            op = self.values.get(name) or self.made[name]
            node = self.space.node_of(op)
            missing = self._mask(node, UNUSED, ONCE)
            if reader is None:
                costs[node][missing] = np.inf
                continue
            other = number["op", self.again[reader].origin]
            runs = self._mask(other, AGAIN_TOO)
            if node != other:
                m = np.zeros((len(missing), len(runs)))
                m[np.ix_(missing, runs)] = np.inf
                add_edge(own, node, other, m)

    def _usages(self, active: Sequence[int]) -> list[Usage]:
        space = self.space
        found = []
        for site in space.flow.sites.values():
            op = site.op
            node = space.node_of(op)
            there = self._there(node, op.name in self.again)
            for u in space.site_usages(site, active):
                found.append(_masked(u, there))
        for home in space.flow.homes:
            node = space.number["home", home.id]
            there = self._there(node, False)
            for u in space.home_usages(home, active):
                found.append(_masked(u, there))
        return found

    def _there(self, node: int, again: bool) -> NDArray[np.bool_]:
        """The strategies in which a usage of the node takes memory."""
        modes = self.modes[node]
        if modes == OP and not again:
            return self._mask(node, *OP)
        return self._mask(node, PRESENT, AGAIN_TOO, COPIED, REDONE, OWN, ALWAYS)

    # ---- solutions --------------------------------------------------------------------------

    def saved(self, strategy: Sequence[int]) -> tuple[str, ...]:
        """The values of forward bodies that a solution keeps, by the model's names."""
        found = []
        for name, op in self.values.items():
            mode = self._mode(self.space.number["op", op.name], strategy)
            if mode in (KEPT, COPIED):
                found.append(name.removesuffix(AGAIN))
        return tuple(found)

    def _mode(self, node: int, strategy: Sequence[int]) -> str:
        return self.modes[node][strategy[node] // self.space.strategies(node)]

    def profile(self, strategy: Sequence[int]) -> NDArray[np.float64]:
        """Bytes that a solution needs at every step, as the ILP counts them."""
        space = self.space
        steps = range(space.flow.steps)
        found = np.zeros(space.flow.steps)
        for u in self._usages(steps):
            found[u.start : u.stop] += u.amount[strategy[u.node]]
        for c, _ in space.conversion_seconds:
            ends = [space.number[space.key(place)] for place in (c.source, c.target)]
            source, target = (self._mode(node, strategy) for node in ends)
            if not space.touches(c, steps) or self._fate(c).of(source, target) != RUNS:
                continue
            amounts = space.pair_bytes(c)
            i, j = (
                int(space.rows(place)[1][strategy[node] % space.strategies(node)])
                for place, node in zip((c.source, c.target), ends, strict=True)
            )
            for kind, start, stop in space.pair_steps(c, steps):
                found[start:stop] += amounts[kind][i, j]
        return found


def _masked(usage: Usage, there: NDArray[np.bool_]) -> Usage:
    amount = np.tile(usage.amount, len(there) // len(usage.amount)) * there
    return Usage(usage.node, usage.start, usage.stop, amount)
