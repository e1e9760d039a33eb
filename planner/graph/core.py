"""The logical model: tensors, ops with factor rules, loops; as if for one huge device.

A rule is an einsum generalised: every dimension of every operand and result is an ordered
tuple of factors, and every factor has a kind that says what sharding it needs:

    parallel   independent pieces
    reduce     pieces give partial results, to be combined with the op's `combiner`
    blocked    must be whole on every device
    window     needs data of its neighbours (convolution, pooling)

Only data types and their consistency checks live here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

ROLES = (
    "input", "parameter", "state", "cache", "gradient", "residual", "activation", "scalar",
    "copy",  # of a parameter, made once a step
)  # fmt: skip
FLOATS = ("f64", "f32", "bf16", "f16", "f8")
ARGUMENTS = ("input", "parameter", "state", "cache")  # roles of what a step is given


@dataclass(frozen=True)
class Tensor:
    """A logical array. `dims` are the names of its dimensions, for people and annotations."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    dims: tuple[str, ...]
    role: str = "activation"

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def floating(self) -> bool:
        """Whether it has a gradient: numbers and truth values have none."""
        return self.dtype in FLOATS


@dataclass(frozen=True)
class Factor:
    name: str
    size: int
    kind: str = "parallel"


Dims = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Rule:
    """Factors of an op, and for every operand and result dimension the factors it is made of.

    `linear`: operand groups; if all operands of a group are partial sums over an axis, so is
    the result. `combiner`: how partial results of reduce factors are combined. `windows`: for
    every spatial dimension the factors of x and of y, which are only split together.
    """

    factors: tuple[Factor, ...]
    ins: tuple[Dims, ...]
    outs: tuple[Dims, ...]
    linear: tuple[tuple[int, ...], ...] = ()
    combiner: str = "sum"
    windows: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Op:
    """One operation. `attrs` hold what evaluation needs (expressions, strides, …).

    `origin` names the forward op of which this one is the recomputation: both are one
    decision. `phase` is forward, recompute, backward or update.
    """

    name: str
    kind: str
    ins: tuple[str, ...]
    outs: tuple[str, ...]
    rule: Rule
    attrs: Mapping[str, Any] = field(default_factory=dict)
    phase: str = "forward"
    origin: str = ""


@dataclass(frozen=True)
class Carry:
    """A value handed from iteration to iteration: outer `init` → body `entry` … body `exit`
    → outer `result`. All four have the same shape, dtype and, in a plan, the same spec."""

    init: str
    entry: str
    exit: str
    result: str


@dataclass(frozen=True)
class Stack:
    """A stacked outer tensor `outer` [times, …] and its slice of one iteration `inner` […]."""

    outer: str
    inner: str


@dataclass(frozen=True)
class Loop:
    """`times` executions of `body`; `reads` are sliced, `writes` stacked, `shared` passed whole.

    With `reverse` the iterations run from the last slice to the first. Those of a loop `of_parts`
    work on parts of the batch: what each gives to a gradient is added up in full precision.
    Body tensors in `shared` keep their outer name.
    """

    name: str
    times: int
    body: Graph
    carries: tuple[Carry, ...] = ()
    reads: tuple[Stack, ...] = ()
    writes: tuple[Stack, ...] = ()
    shared: tuple[str, ...] = ()
    reverse: bool = False
    phase: str = "forward"
    of_parts: bool = False

    @property
    def ins(self) -> tuple[str, ...]:
        outer = (*(k.init for k in self.carries), *(s.outer for s in self.reads), *self.shared)
        return tuple(dict.fromkeys(outer))

    @property
    def outs(self) -> tuple[str, ...]:
        return (*(k.result for k in self.carries), *(s.outer for s in self.writes))


Node = Op | Loop


@dataclass(frozen=True)
class Graph:
    """Tensors by unique name (unique over all loop bodies too) and nodes in execution order.

    `aliases` maps an output to the input whose memory and spec it takes over (donated state).
    `cotangents` maps a tensor to the one that holds its whole cotangent, where there is one.
    """

    tensors: Mapping[str, Tensor]
    nodes: tuple[Node, ...]
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    cotangents: Mapping[str, str] = field(default_factory=dict)

    def walk(self, times: int = 1) -> Iterator[tuple[Op, int]]:
        """Every op of the graph and its loop bodies, with how often it runs in a step."""
        for node in self.nodes:
            if isinstance(node, Op):
                yield node, times
            else:
                yield from node.body.walk(times * node.times)

    def loops(self) -> Iterator[Loop]:
        """Every loop, before those in its body."""
        for node in self.nodes:
            if isinstance(node, Loop):
                yield node
                yield from node.body.loops()

    def all_tensors(self) -> dict[str, Tensor]:
        found = dict(self.tensors)
        for node in self.nodes:
            if isinstance(node, Loop):
                found.update(node.body.all_tensors())
        return found

    def parameters(self) -> tuple[Tensor, ...]:
        return tuple(self.tensors[n] for n in self.inputs if self.tensors[n].role == "parameter")

    def of_parameters(self, names: Collection[str] | None = None) -> set[str]:
        """Parameters (`names`: only of these), one layer's pieces of them, and what is made of
        them alone."""
        tensors = self.all_tensors().values()
        found = {t.name for t in tensors if t.role == "parameter"} if names is None else {*names}
        self._add_made_of(found)
        return found

    def _add_made_of(self, found: set[str]) -> None:
        for node in self.nodes:
            if isinstance(node, Op):
                if node.ins and found.issuperset(node.ins):
                    found.update(node.outs)
                continue
            found.update(read.inner for read in node.reads if read.outer in found)
            node.body._add_made_of(found)

    @property
    def parameter_count(self) -> int:
        return sum(t.elements for t in self.parameters())
