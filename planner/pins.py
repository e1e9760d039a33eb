"""From a user's annotation to pinned specs: what one annotated tensor says about others.

Like JAX's `with_sharding_constraint`, an annotation of an activation holds for its cotangent
and for its recomputation too; that of a parameter holds for where it is stored, not for the
copies that are read. That of a copy (a parameter cast for computing) holds for what is read: its
gradient is reduced to where the parameter lies, by way of whatever is cheapest.

A plan's own annotation is of the named tensors alone: the plan was free to lay cotangents and
recomputations otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import Enum

from planner.graph.ahead import narrowed_of
from planner.graph.core import ARGUMENTS, Graph, Loop
from planner.graph.recompute import AGAIN, SAVED
from planner.sharding.choices import WHOLE_NAMES
from planner.sharding.spec import Sizes, Spec


class Meaning(Enum):
    """What an annotation is about: what plans may not do (constraints), how a program runs that
    somebody wrote, or one plan, tensor by tensor."""

    CONSTRAINTS = "constraints"
    PROGRAM = "program"
    PLAN = "plan"


Annotation = Mapping[str, Sequence[Sequence[str]]]  # tensor → for every dimension its axes


def exact(annotation: Annotation) -> dict[str, tuple[tuple[str, ...], ...]]:
    """The annotation as values that can be compared."""
    return {name: tuple(map(tuple, dims)) for name, dims in annotation.items()}


def in_loops(
    annotation: Annotation, members: Mapping[str, Sequence[str]]
) -> dict[str, tuple[tuple[str, ...], ...]]:
    """An annotation of layers that are written out as one of the loop that they have become: what
    is said of one layer is said of all. PinError if it says different things of them."""
    stacks = in_loop(annotation, members)
    found: dict[str, tuple[tuple[str, ...], ...]] = {}
    for name, dims in exact(annotation).items():
        stack = stacks[name]
        if found.setdefault(stack, dims) != dims:
            raise PinError(name, f"its layer is planned as one with that of '{stack}', which lies "
                           "differently")  # fmt: skip
    return found


def in_loop(names: Iterable[str], members: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """The loop's names of tensors, or of what belongs to them (states, cotangents)."""
    loop_of = {name: stack for stack, names in members.items() for name in names}
    return {name: _stack(name, loop_of) for name in names}


def _stack(name: str, loop_of: Mapping[str, str]) -> str:
    whole, rest = name, ""
    while whole and whole not in loop_of:
        whole, dot, last = whole.rpartition(".")
        rest = f"{dot}{last}{rest}"
    return loop_of[whole] + rest if whole else name


class PinError(ValueError):
    """An annotation that cannot hold; `tensor` names it."""

    def __init__(self, tensor: str, message: str) -> None:
        super().__init__(tensor, message)  # both, so that it can be sent between processes
        self.tensor = tensor
        self.message = message

    def __str__(self) -> str:
        return f"'{self.tensor}': {self.message}"


def pinned_specs(
    graph: Graph, annotation: Annotation, sizes: Sizes, uneven: bool = False,
    meaning: Meaning = Meaning.CONSTRAINTS,
) -> dict[str, Spec]:  # fmt: skip
    """Spec of every tensor of the training step that the annotation decides.

    Annotations leave stacked dimensions out, which stay whole; others than parameters may have
    them. Raises PinError for an unknown tensor or axis, a wrong rank, an axis used twice or a size
    that does not divide (`uneven`: of an argument of the step; others may be padded).
    """
    tensors = graph.all_tensors()
    copies = copies_of_parameters(graph)
    pins: dict[str, Spec] = {}
    for name, dims in annotation.items():
        if name not in tensors:
            raise PinError(name, "there is no such tensor in the training step")
        spec = Spec(tuple(tuple(d) for d in dims))
        tensor = tensors[name]
        stacked = sum(d in WHOLE_NAMES for d in tensor.dims)
        whole = tensor.role != "parameter" and len(dims) == len(tensor.shape)
        shape = tensor.shape if whole else tensor.shape[stacked:]
        _check(name, spec, shape, sizes, uneven and tensor.role not in ARGUMENTS)
        # Axes of size 1 split nothing: the specs of choices have none.
        left_out: list[tuple[str, ...]] = [()] * (len(tensor.shape) - len(dims))
        spec = Spec((*left_out, *(tuple(a for a in d if sizes[a] > 1) for d in spec.dims)))
        pins[name] = spec
        if tensor.role == "parameter" or meaning is Meaning.PLAN:
            continue
        cotangent = None if name in copies else graph.cotangents.get(name)
        for other in (name + AGAIN, cotangent):
            if other in tensors and tensors[other].shape == tensor.shape:
                pins[other] = spec
    return pins


def copies_of_parameters(graph: Graph) -> set[str]:
    """Parameters cast for computing."""
    tensors = graph.all_tensors()
    return {
        op.outs[0]
        for op, _ in graph.walk()
        if len(op.ins) == 1
        and tensors[op.ins[0]].role == "parameter"
        and tensors[op.outs[0]].shape == tensors[op.ins[0]].shape
    }


def part_copies(graph: Graph, pins: Mapping[str, Spec]) -> dict[str, Spec]:
    """Pins of the copies that the loop over parts of the batch gets of pinned parameters.

    Who says how a step runs does not mean that weights are gathered once for all parts, which
    would be cheap, and fill the memory.
    """
    narrowed = narrowed_of(graph)
    return {
        f"{name}@{node.name}": pins[parameter]
        for node in graph.nodes
        if isinstance(node, Loop) and node.of_parts
        for name, parameter in ((n, narrowed.get(n, n)) for n in node.shared)
        if parameter in pins and graph.tensors[parameter].role == "parameter"
    }


def saved_values(graph: Graph, pins: Mapping[str, Spec]) -> dict[str, Spec]:
    """Pins of the stacks of pinned activations: programs written by hand save what they compute
    as it lies, and gather again in the backward pass what they gathered before."""
    tensors = graph.all_tensors()
    return {
        name + SAVED: Spec(((), *spec.dims))
        for name, spec in pins.items()
        if name + SAVED in tensors and len(tensors[name + SAVED].shape) == len(spec.dims) + 1
    }


def _check(
    name: str, spec: Spec, shape: Sequence[int], sizes: Sizes, uneven: bool
) -> None:
    if len(spec.dims) != len(shape):
        raise PinError(name, f"{len(spec.dims)} dimensions annotated, it has {len(shape)}")
    unknown = [a for a in spec.axes if a not in sizes]
    if unknown:
        raise PinError(name, f"unknown mesh axis '{unknown[0]}'; the mesh has {', '.join(sizes)}")
    if len(set(spec.axes)) != len(spec.axes):
        raise PinError(name, "a mesh axis can split only one dimension of a tensor")
    if not spec.fits(shape, sizes, uneven):
        raise PinError(name, f"{spec} does not divide {list(shape)} evenly")
