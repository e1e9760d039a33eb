"""Which intermediate values of repeated bodies to save: a chain of sets from none to all.

The chain starts with what full recomputation saves and adds, one after the other, the value whose
saving avoids the most recomputation per byte. Only the graph and the cost of its ops are looked
at here; which set is best on a mesh, within its memory, is for a planner to find out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from planner.graph.core import Graph, Loop, Node, Op
from planner.graph.derive import training_step
from planner.graph.recompute import AGAIN
from planner.model import Model

LINKS = 8  # sets of a chain that are worth planning: neighbours hardly differ
Seconds = Callable[[Op], float]


def chain(
    model: Model, seconds: Seconds, item_bytes: Mapping[str, int], keep: Sequence[str] = ()
) -> list[tuple[str, ...]]:
    """Growing sets of values to save, at most LINKS of them, evenly spread over their bytes; the
    empty set and the largest are left out, for they are the policies full and none. `seconds` of
    one execution of an op compares ops, no more."""
    graph = training_step(replace(model, workload=replace(model.training, remat="full")), keep)
    bodies = [_Body(loop, seconds, item_bytes) for loop in _backward_loops(graph.nodes)]
    order: list[tuple[str, int]] = []  # value and bytes, best first
    while any(body.gains() for body in bodies):
        _, name, body = max(
            ((rate, name, body) for body in bodies for name, rate in body.gains().items()),
            key=lambda found: found[:2],
        )
        order.append((name, body.sizes[name]))
        body.save(name)
    return _thinned(order)


def saved_values(model: Model) -> frozenset[str]:
    """What the bodies of the forward pass save, by the model's names."""
    return saved_in(training_step(model))


def saved_in(step: Graph) -> frozenset[str]:
    """The same of a step."""
    return frozenset(_saved(step.nodes))


def _saved(nodes: Iterable[Node]) -> Iterable[str]:
    for node in nodes:
        if isinstance(node, Loop):
            if node.phase == "forward":
                yield from (s.inner for s in node.writes)
            yield from _saved(node.body.nodes)  # a loop over parts of the batch holds all phases


def _backward_loops(nodes: Iterable[Node]) -> Iterable[Loop]:
    """Outermost loops that recompute: what inner ones save follows from theirs."""
    for node in nodes:
        if isinstance(node, Loop):
            if any(inner.phase == "recompute" for inner in node.body.nodes):
                yield node
            else:
                yield from _backward_loops(node.body.nodes)


@dataclass
class _Body:
    """One backward body: what it recomputes while `saved` is what it saves."""

    loop: Loop
    seconds: Seconds
    item_bytes: Mapping[str, int]
    saved: set[str] = field(default_factory=set)
    known: dict[str, float] | None = None

    def __post_init__(self) -> None:
        again = [n for n in self.loop.body.nodes if n.phase == "recompute"]
        self.makers = {_plain(o): n for n in again for o in n.outs}
        self.cost = {n.name: _seconds(n, self.seconds) for n in again}
        rest = (n for n in self.loop.body.nodes if n.phase != "recompute")
        self.wanted = {_plain(i) for n in rest for i in n.ins} & self.makers.keys()
        tensors = self.loop.body.tensors
        cheap = self._from_parameters(again)
        self.sizes = {
            name: self.loop.times * t.elements * self.item_bytes[t.dtype]
            for name in self.makers
            if name not in cheap and (t := tensors[name + AGAIN])
        }

    def _from_parameters(self, again: Sequence[Node]) -> set[str]:
        """Values made of parameters alone: to save them would be to store parameters twice."""
        tensors = self.loop.body.tensors
        found = {s.inner for s in self.loop.reads if tensors[s.inner].role == "parameter"}
        for node in again:
            if node.ins and found.issuperset(node.ins):
                found.update(node.outs)
        return {_plain(name) for name in found}

    def redone(self, saved: set[str]) -> float:
        """Seconds of recomputation, per iteration, if `saved` is saved."""
        pending, done = list(self.wanted), set[str]()
        ops: set[str] = set()
        while pending:
            name = pending.pop()
            if name in done or name in saved or name not in self.makers:
                continue
            done.add(name)
            maker = self.makers[name]
            ops.add(maker.name)
            pending += [_plain(i) for i in maker.ins]
        return sum(self.cost[name] for name in sorted(ops))

    def gains(self) -> Mapping[str, float]:
        """Seconds avoided per byte, of every value that would avoid any."""
        if self.known is None:
            now = self.redone(self.saved)
            rates = {
                name: (now - self.redone({*self.saved, name})) * self.loop.times / size
                for name, size in self.sizes.items()
                if name not in self.saved
            }
            self.known = {name: rate for name, rate in rates.items() if rate > 0}
        return self.known

    def save(self, name: str) -> None:
        self.saved.add(name)
        self.known = None


def _plain(name: str) -> str:
    """The forward value of which `name` is the recomputation."""
    return name.removesuffix(AGAIN)


def _seconds(node: Node, seconds: Seconds) -> float:
    if isinstance(node, Op):
        return seconds(node)
    return node.times * sum(n * seconds(op) for op, n in node.body.walk())


def _thinned(order: Sequence[tuple[str, int]]) -> list[tuple[str, ...]]:
    """Sets after which at least 1/LINKS of all bytes has been added since the last."""
    total = sum(size for _, size in order)
    found: list[tuple[str, ...]] = []
    since = 0
    for i, (_, size) in enumerate(order[:-1]):
        since += size
        if since * LINKS >= total:
            found.append(tuple(name for name, _ in order[: i + 1]))
            since = 0
    return found
