"""Layers written out one by one, found and rewritten as the loop that `repeat` would have built.

A run is folded where every layer has the same ops in the same order, wired alike: each reads its
own layer, its own parameters, the layer before through the same carries, and what all layers
read. Names in the loop are those of its first layer; `members` holds the names of the others.
What is asked of single tensors (`pins`) keeps layers apart that it tells apart. Nothing here knows
sharding or files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from planner.graph.core import Carry, Graph, Loop, Node, Op, Stack, Tensor

LEAST_TIMES = 2
PERIODS = 16  # distances between like ops that are tried, the most frequent first: linear time

Slot = tuple[str, Hashable, int]  # where an operand comes from, as its layer sees it


@dataclass(frozen=True)
class Folded:
    """`members`: tensor of the folded graph → the tensors, layer by layer, that it stands for;
    none for what only the loop has."""

    graph: Graph
    members: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class _Run:
    """`times` layers of `period` nodes each; `wiring` says where the operands of a layer after
    the first come from."""

    start: int
    period: int
    times: int
    wiring: tuple[Slot, ...]

    @property
    def end(self) -> int:
        return self.start + self.period * self.times


def fold(graph: Graph, pins: Mapping[str, Hashable] | None = None) -> Folded:
    """The graph with its runs of like layers as loops; without such runs, as it is.

    What is asked of one layer's tensor holds for all of a run. Where that would ask two things of
    one, only layers are alike that are asked for the same.
    """
    folded = _Folder(graph, {}).folded()
    if pins and _contradict(folded, pins):
        return _Folder(graph, pins).folded()
    return folded


def _contradict(folded: Folded, pins: Mapping[str, Hashable]) -> bool:
    """Whether tensors that lie alike, in one stack or one carry, are asked for different things."""
    members = folded.members
    loops = [node for node in folded.graph.nodes if isinstance(node, Loop)]
    carried = [(k.init, *members.get(k.exit, ())) for loop in loops for k in loop.carries]
    alike = (*members.values(), *carried)
    return any(len({pins[name] for name in names if name in pins}) > 1 for names in alike)


class _Folder:
    def __init__(self, graph: Graph, pins: Mapping[str, Hashable]) -> None:
        self.graph = graph
        self.pins = pins
        self.nodes = graph.nodes
        self.made = {
            name: (i, k) for i, node in enumerate(self.nodes) for k, name in enumerate(node.outs)
        }
        self.users: dict[str, list[int]] = {}
        for i, node in enumerate(self.nodes):
            for name in dict.fromkeys(node.ins):
                self.users.setdefault(name, []).append(i)
        kept = (*graph.outputs, *graph.aliases, *graph.aliases.values())
        for name in (*kept, *graph.cotangents, *graph.cotangents.values()):
            self.users.setdefault(name, []).append(len(self.nodes))
        numbers: dict[Hashable, int] = {}
        self.keys = [numbers.setdefault(self._key(i), len(numbers)) for i in range(len(self.nodes))]
        self.names = set(graph.all_tensors())

    def folded(self) -> Folded:
        runs = self._chosen()
        if not runs:
            return Folded(self.graph, {})
        tensors = dict(self.graph.tensors)
        nodes: list[Node] = []
        members: dict[str, tuple[str, ...]] = {}
        at = 0
        for run in runs:
            nodes += [*self.nodes[at : run.start], self._loop(run, tensors, members)]
            at = run.end
        nodes += self.nodes[at:]
        inputs = tuple(name for name in self.graph.inputs if name in tensors)
        graph = replace(self.graph, tensors=tensors, nodes=tuple(nodes), inputs=inputs)
        return Folded(graph, members)

    # ---- what is alike -------------------------------------------------------------------

    def _key(self, i: int) -> Hashable:
        """What two ops must share to be one op of a loop; inner loops are like nothing else."""
        node = self.nodes[i]
        if isinstance(node, Loop):
            return i
        attrs = repr(sorted(node.attrs.items()))
        kinds = tuple(self._kind(name) for name in (*node.ins, *node.outs))
        return node.kind, node.phase, node.origin, node.rule, attrs, kinds

    def _kind(self, name: str) -> Hashable:
        t = self.graph.tensors[name]
        named = t.dims if t.role == "parameter" else ()  # carries may come in under other labels
        return t.shape, t.dtype, t.role == "parameter", named, self.pins.get(name)

    def _periods(self) -> list[int]:
        """Distances at which like ops follow each other; an op's producers tell it from others
        of its layer."""
        seen: dict[Hashable, int] = {}
        found: Counter[int] = Counter()
        for i, node in enumerate(self.nodes):
            sources = tuple(self.keys[self.made[n][0]] if n in self.made else -1 for n in node.ins)
            key = self.keys[i], sources
            if key in seen:
                found[i - seen[key]] += 1
            seen[key] = i
        return [period for period, _ in found.most_common(PERIODS)]

    def _chosen(self) -> list[_Run]:
        """Runs that do not overlap: those that cover most come first, then short layers."""
        found = [run for period in self._periods() for run in self._runs(period)]
        found.sort(key=lambda run: (run.start - run.end, run.period, run.start))
        taken = [False] * len(self.nodes)
        chosen = []
        for run in found:
            if not any(taken[run.start : run.end]):
                taken[run.start : run.end] = [True] * (run.end - run.start)
                chosen.append(run)
        return sorted(chosen, key=lambda run: run.start)

    # ---- runs of one period ---------------------------------------------------------------

    def _runs(self, period: int) -> Iterator[_Run]:
        keys, at = self.keys, 0
        while at + period < len(keys):
            end = at
            while end + period < len(keys) and keys[end] == keys[end + period]:
                end += 1
            if end - at >= period:
                yield from self._cut(at, end + period, period)
            at = end + 1

    def _cut(self, low: int, high: int, period: int) -> Iterator[_Run]:
        """Layers of the nodes low … high, cut where the fewest values pass from one to the next."""
        middle = low + (high - low) // period // 2 * period

        def cost(shift: int) -> tuple[int, int, int]:
            border = middle + shift
            return self._crossing(border, period), -((high - low - shift) // period), shift

        yield from self._wired(low + min(range(period), key=cost), high, period)

    def _crossing(self, border: int, period: int) -> int:
        """How many values made in the layer before `border` are read in the layer after it."""
        before = self.nodes[max(0, border - period) : border]
        after = {name for node in self.nodes[border : border + period] for name in node.ins}
        return sum(name in after for node in before for name in node.outs)

    def _wired(self, start: int, high: int, period: int) -> Iterator[_Run]:
        """The longest runs of wired-alike layers from `start` on."""
        while start + LEAST_TIMES * period <= high:
            wiring: tuple[Slot, ...] = ()
            times = 1
            while start + (times + 1) * period <= high:
                last = start + (times - 1) * period
                if self._escapes(last, period, last + 2 * period):
                    break
                found = self._wiring(last, period, entering=times == 1)
                if found is None or (times > 1 and found != wiring):
                    break
                wiring, times = found, times + 1
            run = self._closed(_Run(start, period, times, wiring))
            if run is not None:
                yield run
            start += period * (times if run is None else run.times)

    def _closed(self, run: _Run) -> _Run | None:
        """The run without last layers of which more than the carries is read outside of it."""
        exits = {slot[1:] for slot in run.wiring if slot[0] == "before"}
        while run.times >= LEAST_TIMES:
            last = run.end - run.period
            outside = self._escapes(last, run.period, run.end)
            if outside <= exits and self._own_parameters(run):
                return run
            run = replace(run, times=run.times - 1)
        return None

    def _escapes(self, first: int, period: int, end: int) -> set[tuple[Hashable, int]]:
        """(position, result) of what the layer at `first` makes and nodes from `end` on read."""
        return {
            (position, k)
            for position in range(period)
            for k, name in enumerate(self.nodes[first + position].outs)
            if self.users.get(name, (0,))[-1] >= end
        }

    def _wiring(self, first: int, period: int, entering: bool) -> tuple[Slot, ...] | None:
        """How the layer after the one at `first` is wired, if that one is wired alike; if it is
        the first (`entering`), what it reads of the layer before may come from anywhere."""
        slots = []
        for position in range(period):
            ins = zip(self.nodes[first + position].ins, self.nodes[first + position + period].ins,
                      strict=True)  # fmt: skip
            for here, there in ins:
                slot = self._slot(here, there, first, period, entering)
                if slot is None:
                    return None
                slots.append(slot)
        return tuple(slots)

    def _slot(
        self, here: str, there: str, first: int, period: int, entering: bool
    ) -> Slot | None:
        second = first + period
        at, k = self.made.get(there, (-1, 0))
        before = self.made.get(here, (-1, 0))
        if at >= second:
            return ("own", at - second, k) if before == (at - period, k) else None
        if at >= first:
            alike = before[0] < first if entering else before == (at - period, k)
            return ("before", at - first, k) if alike and self._like(here, there) else None
        if here == there:
            return "shared", here, 0
        tensors = self.graph.tensors
        stackable = at < 0 and before[0] < 0 and tensors[here].role == "parameter"
        return ("parameter", "", 0) if stackable else None

    def _like(self, here: str, there: str) -> bool:
        a, b = self.graph.tensors[here], self.graph.tensors[there]
        alike = (a.shape, a.dtype, self.pins.get(here)) == (b.shape, b.dtype, self.pins.get(there))
        return alike and a.role != "parameter"

    # ---- the loop --------------------------------------------------------------------------

    def _operands(self, run: _Run) -> list[tuple[str, ...]]:
        """For every operand of a layer its names, layer by layer."""
        layers = [
            [name for node in self.nodes[at : at + run.period] for name in node.ins]
            for at in range(run.start, run.end, run.period)
        ]
        return list(zip(*layers, strict=True))

    def _own_parameters(self, run: _Run) -> bool:
        """Whether parameters differ from layer to layer, and always in the same places; a layer
        without any is none: folding it would save nothing."""
        stacks = {
            names for slot, names in zip(run.wiring, self._operands(run), strict=True)
            if slot[0] == "parameter"
        }  # fmt: skip
        members = [name for names in stacks for name in names]
        inside = all(
            run.start <= user < run.end for name in members for user in self.users[name]
        )
        return bool(members) and len(set(members)) == len(members) and inside

    def _loop(
        self, run: _Run, tensors: dict[str, Tensor], members: dict[str, tuple[str, ...]]
    ) -> Loop:
        body: dict[str, Tensor] = {}
        entries: list[str] = []  # what the first layer's operands are called inside
        carries: dict[tuple[str, str], Carry] = {}
        reads: dict[str, Stack] = {}
        shared: dict[str, None] = {}
        for slot, names in zip(run.wiring, self._operands(run), strict=True):
            first = names[0]
            if slot[0] == "parameter":
                if first not in reads:
                    reads[first] = self._stacked(names, tensors, body)
                    members[first] = names
                entries.append(reads[first].inner)
            elif slot[0] == "before":
                key = first, self._made_by(run, 0, slot)
                if key not in carries:
                    carry = self._carry(run, slot, first, carries, tensors, body)
                    members[carry.entry] = ()
                    if carry.result not in self.made:
                        members[carry.result] = ()
                    carries[key] = carry
                entries.append(carries[key].entry)
            else:
                if slot[0] == "shared":
                    shared[first] = None
                entries.append(first)
        ops = self._body_ops(run, entries)
        results = {carry.result for carry in carries.values()}
        for position in range(run.period):
            self._move(run, position, results, tensors, body, members)
        return Loop(
            ops[-1].name + ".layers", run.times, Graph(body, tuple(ops)), tuple(carries.values()),
            tuple(reads.values()), (), tuple(shared), phase=ops[0].phase,
        )  # fmt: skip

    def _made_by(self, run: _Run, layer: int, slot: Slot) -> str:
        position = slot[1]
        assert isinstance(position, int)
        return self.nodes[run.start + layer * run.period + position].outs[slot[2]]

    def _stacked(
        self, names: Sequence[str], tensors: dict[str, Tensor], body: dict[str, Tensor]
    ) -> Stack:
        first = self.graph.tensors[names[0]]
        for name in names:
            del tensors[name]
        shape, dims = (len(names), *first.shape), ("layers", *first.dims)
        tensors[first.name] = replace(first, shape=shape, dims=dims)
        inner = replace(first, name=f"{first.name}[i]")
        body[inner.name] = inner
        return Stack(first.name, inner.name)

    def _carry(
        self, run: _Run, slot: Slot, init: str, others: Mapping[tuple[str, str], Carry],
        tensors: dict[str, Tensor], body: dict[str, Tensor],
    ) -> Carry:  # fmt: skip
        """The result keeps its name, by which nodes after the loop read it."""
        out, result = self._made_by(run, 0, slot), self._made_by(run, run.times - 1, slot)
        if any(carry.result == result for carry in others.values()):  # entered twice
            result = self._unique(f"{result}.too")
            tensors[result] = replace(self.graph.tensors[out], name=result)
        entry = self._unique(f"{out}.in")
        body[entry] = replace(self.graph.tensors[init], name=entry, role="activation")
        return Carry(init, entry, out, result)

    def _unique(self, name: str) -> str:
        found, count = name, 1
        while found in self.names:
            count += 1
            found = f"{name}_{count}"
        self.names.add(found)
        return found

    def _body_ops(self, run: _Run, entries: Sequence[str]) -> list[Op]:
        ops, at = [], 0
        for node in self.nodes[run.start : run.start + run.period]:
            assert isinstance(node, Op)
            ops.append(replace(node, ins=tuple(entries[at : at + len(node.ins)])))
            at += len(node.ins)
        return ops

    def _move(
        self, run: _Run, position: int, results: set[str], tensors: dict[str, Tensor],
        body: dict[str, Tensor], members: dict[str, tuple[str, ...]],
    ) -> None:  # fmt: skip
        """What the layers make at `position` moves into the body, under the first one's name."""
        layers = [self.nodes[i].outs for i in range(run.start + position, run.end, run.period)]
        for names in zip(*layers, strict=True):
            body[names[0]] = self.graph.tensors[names[0]]
            members[names[0]] = names
            for name in names:
                if name not in results:
                    del tensors[name]
