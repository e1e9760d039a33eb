"""A forward graph cut into pieces that follow each other.

The graph is a row of *units*: a run of ops between two loops, or one iteration of a loop. A piece
is a run of units. Pieces are graphs like any other, in which tensors keep their names; what they
receive and send are the tensors made before a cut and read behind it. What is made of parameters
alone, such as a cast, every piece makes for itself. Where to cut is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from planner.errors import InputError
from planner.graph.core import Graph, Loop, Node, Op
from planner.graph.derive import Boundary, differentiable
from planner.sharding.choices import WHOLE_NAMES


class PipelineError(InputError):
    """A model that cannot be cut into so many stages, or a schedule that cannot be."""


@dataclass(frozen=True)
class Unit:
    """Ops [start, stop) of the graph's nodes, or iteration `turn` of the loop at `start`."""

    start: int
    stop: int
    turn: int = -1


@dataclass(frozen=True)
class Piece:
    """`received` and `sent`: what crosses, by its name in the whole graph, and its name here.
    Pieces of equal `kind` differ only in how often their loops run."""

    graph: Graph
    boundary: Boundary
    received: Mapping[str, str]
    sent: Mapping[str, str]
    kind: tuple[object, ...]
    turns: Mapping[str, tuple[int, int]]  # stacked parameter → the layers of it that are here

    @property
    def layers(self) -> int:
        return sum(n.times for n in self.graph.nodes if isinstance(n, Loop))


def units(graph: Graph) -> list[Unit]:
    """The row of units, in order."""
    found: list[Unit] = []
    start = 0
    for i, node in enumerate(graph.nodes):
        if isinstance(node, Loop):
            if i > start:
                found.append(Unit(start, i))
            found += [Unit(i, i + 1, turn) for turn in range(node.times)]
            start = i + 1
    if len(graph.nodes) > start:
        found.append(Unit(start, len(graph.nodes)))
    return found


def cut(graph: Graph, starts: Sequence[int]) -> list[Piece]:
    """The pieces that begin at the units `starts`, of which the first is 0."""
    return list(_Cutting(graph, units(graph), tuple(starts)).pieces())


@dataclass
class _Cutting:
    graph: Graph
    row: list[Unit]
    starts: tuple[int, ...]
    made: dict[str, int] = field(default_factory=dict)  # tensor → first unit that makes it
    read: dict[str, int] = field(default_factory=dict)  # tensor → last unit that reads it
    own: dict[str, Op] = field(default_factory=dict)  # what every piece makes for itself → its op

    def __post_init__(self) -> None:
        self.tensors = self.graph.tensors
        self.inputs = set(self.graph.inputs)
        self.parameters = {n for n in self.inputs if self.tensors[n].role == "parameter"}
        self.through = differentiable(self.graph.nodes, self.parameters, self.tensors.__getitem__)
        for node in self.graph.nodes:
            known = {*self.parameters, *self.own}
            if isinstance(node, Op) and known.issuperset(node.ins):
                self.own.update(dict.fromkeys(node.outs, node))
        for number, unit in enumerate(self.row):
            for name in self.unit_ins(unit):
                self.read[name] = number
            for node in self.unit_nodes(unit):
                for name in node.outs:
                    self.made.setdefault(name, number)

    def unit_nodes(self, unit: Unit) -> list[Node]:
        nodes = self.graph.nodes[unit.start : unit.stop]
        return [n for n in nodes if not set(n.outs) <= self.own.keys()]

    def unit_ins(self, unit: Unit) -> Iterator[str]:
        for node in self.unit_nodes(unit):
            if isinstance(node, Op):
                yield from node.ins
                continue
            yield from node.shared
            yield from (k.result if unit.turn else k.init for k in node.carries)

    def crossing(self, bound: int) -> list[str]:
        """What is made before unit `bound` and read from there on."""
        return [
            name for name, first in self.made.items() if first < bound <= self.read.get(name, -1)
        ]

    def bounds(self, number: int) -> tuple[int, int]:
        ends = (*self.starts[1:], len(self.row))
        return self.starts[number], ends[number]

    def readers(self) -> dict[str, list[int]]:
        """Parameters that are not stacked → the pieces that read them."""
        found: dict[str, list[int]] = {}
        for number in range(len(self.starts)):
            start, stop = self.bounds(number)
            names = {n for node in self.nodes(start, stop) for n in _outer_ins(node)}
            for name in sorted(names & self.parameters):
                found.setdefault(name, []).append(number)
        return found

    def pieces(self) -> Iterator[Piece]:
        readers = self.readers()
        for number in range(len(self.starts)):
            yield self.piece(number, readers)

    def piece(self, number: int, readers: Mapping[str, Sequence[int]]) -> Piece:
        start, stop = self.bounds(number)
        nodes = self.nodes(start, stop)
        made = {o for n in nodes for o in n.outs}
        received = {key: self.local(key, start) for key in self.crossing(start)}
        sent = {key: key if key in made else received[key] for key in self.crossing(stop)}
        last = number == len(self.starts) - 1
        if last and self.graph.outputs[0] not in made:
            raise PipelineError("the last stage of a pipeline has to make the loss")
        shared = {
            name: tuple(n for n in where if n != number)
            for name, where in readers.items()
            if number in where and len(where) > 1
        }
        names = {key: received.get(key, key) for key in (*received, *sent)}
        boundary = Boundary(
            tuple(received.values()), tuple(sent.values()),
            frozenset(
                local
                for key in names if key in self.through
                for local in (received.get(key), sent.get(key)) if local
            ),
            shared, last,
        )  # fmt: skip
        outputs = [self.graph.outputs[0]] if last else [n for n in sent.values() if n in made]
        graph = self.subgraph(nodes, received, outputs)
        loops: tuple[object, ...] = tuple(
            (node.name, node.carries) if isinstance(node, Loop) else node.name for node in nodes
        )
        kind = (loops, tuple(received.items()), tuple(sent.items()), tuple(shared.items()))
        return Piece(graph, boundary, received, sent, kind, self.turns(start, stop))

    def turns(self, start: int, stop: int) -> dict[str, tuple[int, int]]:
        """Which iterations of every parameter stack fall to units [start, stop)."""
        found: dict[str, tuple[int, int]] = {}
        for unit in self.row[start:stop]:
            node = self.graph.nodes[unit.start]
            if isinstance(node, Loop):
                for stack in node.reads:
                    first, _ = found.get(stack.outer, (unit.turn, 0))
                    found[stack.outer] = first, unit.turn + 1
        return found

    def local(self, key: str, start: int) -> str:
        """What a tensor from before unit `start` is called in the piece that starts there: a
        loop that goes on makes a new tensor of the carried one's name."""
        unit = self.row[start]
        node = self.graph.nodes[unit.start]
        goes_on = isinstance(node, Loop) and unit.turn > 0
        if goes_on and isinstance(node, Loop) and key in {k.result for k in node.carries}:
            return f"{key}.received"
        return key

    def nodes(self, start: int, stop: int) -> list[Node]:
        """The piece's nodes: ops as they are, loops with fewer iterations."""
        found: list[Node] = []
        at = start
        while at < stop:
            unit = self.row[at]
            node = self.graph.nodes[unit.start]
            if not isinstance(node, Loop):
                found += self.unit_nodes(unit)
                at += 1
                continue
            times = min(node.times - unit.turn, stop - at)
            carries = node.carries
            if unit.turn > 0:
                carries = tuple(replace(k, init=self.local(k.result, at)) for k in node.carries)
            found.append(replace(node, times=times, carries=carries))
            at += times
        return [*self.own_of(found), *found]

    def own_of(self, nodes: Sequence[Node]) -> list[Op]:
        """The ops that make what `nodes` read of `own`, in the order of the graph."""
        needed: dict[str, None] = {}
        pending = [i for n in nodes for i in n.ins]
        while pending:
            op = self.own.get(pending.pop())
            if op is not None and op.name not in needed:
                needed[op.name] = None
                pending += op.ins
        return [n for n in self.graph.nodes if isinstance(n, Op) and n.name in needed]

    def subgraph(
        self, nodes: Sequence[Node], received: Mapping[str, str], outputs: Sequence[str]
    ) -> Graph:
        stacks = {
            s.outer: node.times for node in nodes if isinstance(node, Loop) for s in node.reads
        }
        back = {local: key for key, local in received.items()}
        names = dict.fromkeys(n for node in nodes for n in (*node.ins, *node.outs))
        names.update(dict.fromkeys(back))
        tensors = {}
        for name in names:
            t = self.tensors[back.get(name, name)]
            if name in back:
                t = replace(t, name=name, role="input")
            elif name in stacks:
                t = replace(t, shape=(stacks[name], *t.shape[1:]))
            elif t.role == "parameter" and t.dims[:1] and t.dims[0] in WHOLE_NAMES:
                raise PipelineError(f"'{name}' is read whole, and not layer by layer")
            tensors[name] = t
        inputs = [n for n in self.graph.inputs if n in tensors and n not in back]
        return Graph(tensors, tuple(nodes), (*inputs, *back), tuple(outputs))


def _outer_ins(node: Node) -> tuple[str, ...]:
    """What a node reads whole."""
    if isinstance(node, Op):
        return node.ins
    return (*node.shared, *(k.init for k in node.carries))
