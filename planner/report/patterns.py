"""What experts call a plan: data parallel, FSDP, ZeRO, tensor, sequence, context, expert parallel,
ring attention, pipeline.

Every mesh axis is described by what it splits in the forward pass's products of activations and
weights, where weights, gradients and optimizer states are stored, and how the values that layers
hand on lie. A name is given if it holds for more than half of the weights (by elements), experts
apart.
Nothing here prices or searches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from planner.graph.builder import contraction_sizes
from planner.graph.core import Graph, Loop, Op
from planner.result import Result
from planner.sharding.choices import bound_to

SEQUENCE = ("S", "T")  # positions, and positions of keys
EXPERTS = "E"
HALF = 0.5


@dataclass(frozen=True)
class _Weight:
    """A parameter that a product reads: axes by what they split."""

    elements: int
    expert: bool
    stored: frozenset[str]
    gradient: frozenset[str]
    states: frozenset[str]
    used: frozenset[str] = frozenset()  # over the weight's own dimensions
    experts: frozenset[str] = frozenset()  # over its experts
    batch: frozenset[str] = frozenset()  # over what the weight lacks


@dataclass
class _Handed:
    """Axes over the positions and the width of what layers hand on, over the positions in
    attention, and along which blocks of keys move on."""

    positions: set[str] = field(default_factory=set)
    width: set[str] = field(default_factory=set)
    attention: set[str] = field(default_factory=set)
    ring: set[str] = field(default_factory=set)  # axes along which blocks go round


def patterns(result: Result) -> tuple[str, ...]:
    """`FSDP over x`, `tensor parallel over y`, …; empty if nothing known is recognised."""
    weights = list(_weights(result))
    handed = _handed(result)
    named: dict[str, list[str]] = {}
    pipeline = result.model.pipeline
    if pipeline is not None and dict(result.mesh.axes)[pipeline.axis] > 1:
        named["pipeline"] = [pipeline.axis]
    for axis, size in result.mesh.axes:
        for name in _names(axis, weights, handed) if size > 1 else ():
            named.setdefault(name, []).append(axis)
    _finalized(named, handed)
    return tuple(f"{name} over {' and '.join(axes)}" for name, axes in named.items())


def _names(axis: str, weights: list[_Weight], handed: _Handed) -> Iterator[str]:
    dense = [w for w in weights if not w.expert] or weights
    experts = [w for w in weights if w.expert]
    tensor = _most(dense, lambda w: axis in w.used)
    if _most(dense, lambda w: axis in w.batch):
        if _most(dense, lambda w: axis in w.stored - w.used):
            yield "FSDP"
        elif _most(dense, lambda w: axis in w.states):
            yield "ZeRO-2" if _most(dense, lambda w: axis in w.gradient) else "ZeRO-1"
        else:
            yield "data parallel"
    if _most(experts, lambda w: axis in w.experts):
        yield "expert parallel"
    if tensor:
        yield "tensor parallel"
    if axis in handed.ring:
        yield "ring attention"
    elif axis in handed.attention:
        yield "context parallel"
    elif axis in handed.positions:
        yield "sequence parallel"


def _finalized(named: dict[str, list[str]], handed: _Handed) -> None:
    """Weights stored over both axes, activations by batch and width: GSPMD's own name."""
    data, tensor = named.get("FSDP", []), named.get("tensor parallel", [])
    if data and tensor and handed.width.issuperset(tensor):
        named["2-D finalized"] = [*named.pop("FSDP"), *named.pop("tensor parallel")]


def _most(weights: list[_Weight], holds: Callable[[_Weight], bool]) -> bool:
    total = sum(w.elements for w in weights)
    return sum(w.elements for w in weights if holds(w)) > HALF * total


# ---- facts ---------------------------------------------------------------------------------------


def _weights(result: Result) -> Iterator[_Weight]:
    made_of = _parameters_behind(result.graph)
    tensors = result.graph.all_tensors()
    for op, _ in result.graph.walk():
        if op.phase != "forward" or contraction_sizes(op) is None:
            continue
        behind = [made_of.get(name) for name in op.ins]
        for slot, parameter in enumerate(behind):
            if parameter is None or all(behind):
                continue
            elements = tensors[parameter].elements
            yield _weight(result, op, slot, parameter, elements)


def _weight(result: Result, op: Op, slot: int, parameter: str, elements: int) -> _Weight:
    choice = result.plan.choices[op.origin or op.name]
    own = {f for dim in op.rule.ins[slot] for f in dim}
    used: set[str] = set()
    experts: set[str] = set()
    batch: set[str] = set()
    for i, (factor, axes) in enumerate(zip(op.rule.factors, choice.split, strict=True)):
        if bound_to(factor.name):
            continue  # stages of a pipeline
        if i not in own:
            batch.update(axes if factor.name not in SEQUENCE else ())
        elif factor.name == EXPERTS:
            experts.update(axes)
        else:
            used.update(axes)
    tensors = (result.graph.tensors[n] for n in result.graph.inputs)
    states = [t for t in tensors if t.role == "state" and t.name.startswith(f"{parameter}.")]
    largest = max(states, key=lambda t: t.elements).name if states else ""
    return _Weight(
        elements, EXPERTS in (op.rule.factors[i].name for i in own), _axes(result, parameter),
        _axes(result, result.graph.cotangents.get(parameter, "")), _axes(result, largest),
        frozenset(used), frozenset(experts), frozenset(batch),
    )  # fmt: skip


def _axes(result: Result, tensor: str) -> frozenset[str]:
    spec = result.specs.get(tensor)
    return frozenset(() if spec is None else spec.axes)


def _parameters_behind(graph: Graph) -> dict[str, str]:
    """Every tensor that is a parameter, or made of one alone (cast, split into heads, a slice of
    the stack), with that parameter."""
    found = {p.name: p.name for p in graph.parameters()}
    _follow(graph, found)
    return found


def _follow(graph: Graph, found: dict[str, str]) -> None:
    for node in graph.nodes:
        if isinstance(node, Loop):
            found.update({s.inner: found[s.outer] for s in node.reads if s.outer in found})
            _follow(node.body, found)
        elif len(node.ins) == 1 and node.ins[0] in found and node.phase == "forward":
            found.update(dict.fromkeys(node.outs, found[node.ins[0]]))


def _handed(result: Result) -> _Handed:
    found = _Handed()
    for node in result.graph.nodes:
        _look(node, result, found)
    return found


def _look(node: Op | Loop, result: Result, found: _Handed) -> None:
    if isinstance(node, Loop):
        if node.phase == "forward":
            for carry in node.carries:
                _look_at_carry(carry.entry, result, found)
        for inner in node.body.nodes:
            _look(inner, result, found)
        return
    names = {f.name for f in node.rule.factors}
    if node.phase == "forward" and node.kind == "shift" and node.attrs["wrap"]:
        around, _ = node.rule.windows[0]
        if not bound_to(node.rule.factors[around].name):  # else it is a pipeline's
            found.ring.update(result.plan.choices[node.name].split[around])
    if node.phase == "forward" and contraction_sizes(node) and names.issuperset(SEQUENCE):
        split = result.plan.choices[node.origin or node.name].split
        for factor, axes in zip(node.rule.factors, split, strict=True):
            found.attention.update(axes if factor.name == SEQUENCE[0] else ())


def _look_at_carry(name: str, result: Result, found: _Handed) -> None:
    tensor, spec = result.graph.all_tensors()[name], result.specs.get(name)
    if spec is None:
        return
    for dim, axes in zip(tensor.dims, spec.dims, strict=True):
        found.positions.update(axes if dim in SEQUENCE else ())
        found.width.update(axes if dim == tensor.dims[-1] else ())
